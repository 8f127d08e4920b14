"""Numbers as people write them: 10^-4, 1/10000, 5%, 4k, 1,000, 24GB. No key takes those; the message has the number."""

import re

_NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_POWER = rf"(?P<base>{_NUMBER})(?:\^|\*\*)\(?(?P<exponent>[-+]?\d+)\)?"
_UNITS = r"gib|gb|g|mib|mb|tokens?|steps?|epochs?|rows?|f"
_SCALES = {"%": 0.01, "k": 1e3, "m": 1e6}


def number_meant(text: str, *, is_whole: bool = False) -> str | None:
    """Return the number that a text means, as an option takes it; None where it is none, or not a whole one."""
    value = _value(re.sub(r"\s", "", text.lower()))
    if value is None or abs(value) > 1e15 or (is_whole and not value.is_integer()):
        return None
    return str(int(value)) if value.is_integer() else f"{value:.12g}"


def with_commas(text: str) -> str | None:
    """Return the one number that a text with commas may mean: 1,000 has its thousands apart, 0,05 a decimal comma."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text) and not text.startswith("0"):
        return text.replace(",", "")
    if re.fullmatch(r"0,\d\d+|\d,\d+e-?\d+", text):
        return text.replace(",", ".")
    return None


def _value(text: str) -> float | None:
    if plain := with_commas(text):
        return float(plain)
    if found := re.fullmatch(rf"(?P<left>.+?)(?P<sign>[*x/])(?P<right>{_POWER}|{_NUMBER})", text):
        left, right = _factor(found["left"]), _factor(found["right"])
        if left is not None and right is not None:
            if found["sign"] == "/":
                return left / right if right else None
            return left * right
    return _factor(text)


def _factor(text: str) -> float | None:
    if power := re.fullmatch(_POWER, text):
        base, exponent = float(power["base"]), int(power["exponent"])
        return base**exponent if 0 < abs(base) <= 1e3 and abs(exponent) <= 30 else None
    if found := re.fullmatch(rf"(?P<number>{_NUMBER})(?:(?P<scale>[%km])|{_UNITS})?", text):
        # An exponent is a power of ten, which a product with 0.01 would round.
        return float(f"{float(found['number']) * _SCALES.get(found['scale'] or '', 1.0):.12g}")
    return None
