"""Causal attention over packed samples on a CPU: two implementations of one operator, both tested against the formula.

`operator` registers the operator and picks an implementation; `native` is the compiled one, for bf16 on a processor
with AVX-512; `strips` consists of products of torch and runs anywhere; `grouping` cuts a batch into the strips.
"""
