"""llama.cpp run by its own interpreter: a request is read as JSON, and what it asks for is printed.

That is the greedy tokens behind prompts, the scores of the token behind them, or the tokens of texts.
"""

import itertools
import json
import sys

from llama_cpp import Llama

request = json.load(sys.stdin)
asks_scores = "scores" in request
exact = {"type_k": 0, "type_v": 0} if asks_scores else {}  # a cache in fp32
model = Llama(
    request["model"], lora_path=request.get("adapter"), n_ctx=1024, n_threads=1, verbose=False, logits_all=asks_scores,
    **exact,
)  # fmt: skip
if "texts" in request:
    said = [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]
elif asks_scores:
    said = []
    for prompt in request["scores"]:
        model.reset()
        model.eval(prompt)
        said.append(model.scores[len(prompt) - 1].tolist())
else:
    said = [
        list(itertools.islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), request["tokens"]))
        for prompt in request["prompts"]
    ]
print(json.dumps(said))
