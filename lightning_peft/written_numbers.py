"""Numbers as people write them: 10^-4, 1/10000, 5%, 4k, 1,000, 24GB, 2h. No key takes those; errors say the number."""

import re

_NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_POWER = rf"(?P<base>{_NUMBER})(?:\^|\*\*)\(?(?P<exponent>[-+]?\d+)\)?"
_COUNTED = r"token|step|epoch|row"
_SCALES = {"%": 0.01, "k": 1e3}
_OF_TIME = {"time": 60.0, "grace": 1.0}
"""Last part of a key that takes time -> seconds of its unit."""
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "min": 60, "s": 1}


def number_meant(text: str, key: str = "", *, is_whole: bool = False) -> str | None:
    """Return the number that a text means, as the option `key` takes it; None where it is none, or not a whole one."""
    plain, name = re.sub(r"\s", "", text.lower()), key.rpartition(".")[2]
    if counted := re.fullmatch(rf"(.*\d)({_COUNTED})s?", plain):
        if any(other in name for other in _COUNTED.split("|") if other != counted[2]):
            return None  # as 3 epochs are no 3 steps
        plain = counted[1]
    if name in _OF_TIME and (seconds := seconds_of(plain)) is not None:
        value: float | None = seconds / _OF_TIME[name]
    else:
        value = _value(plain)
    if value is None or abs(value) > 1e15 or (is_whole and not value.is_integer()):
        return None
    return str(int(value)) if value.is_integer() else f"{value:.12g}"


def seconds_of(text: str) -> float | None:
    """Return the seconds of 2h, 90min or 1d12h, or of SLURM's minutes:seconds, hours:minutes:seconds and days-hours."""
    if parts := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", text):
        days, *clock = (int(part or 0) for part in parts.groups())
        if parts[1] is None and parts[3] is None:
            return None  # a number alone
        if parts[1] is None and parts[4] is None:  # minutes come first
            clock = [0, *clock[:2]]
        return days * 86400.0 + clock[0] * 3600 + clock[1] * 60 + clock[2]
    units = re.findall(rf"(\d+\.?\d*)({'|'.join(sorted(_SECONDS, key=len, reverse=True))})", text)
    if not units or "".join(number + unit for number, unit in units) != text:
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in units)


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
    if text.startswith("0x"):  # hexadecimal
        return None
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
    if found := re.fullmatch(rf"(?P<number>{_NUMBER})(?:(?P<scale>[%k])|gib|gb|g|f)?", text):
        # An exponent is a power of ten, which a product with 0.01 would round.
        return float(f"{float(found['number']) * _SCALES.get(found['scale'] or '', 1.0):.12g}")
    return None
