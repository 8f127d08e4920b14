"""`lightning-peft completion bash|zsh|fish`: a script that completes commands, groups, options and keys."""

from lightning_peft.commands import COMMANDS
from lightning_peft.help import TRAINER, every_option
from lightning_peft.options import options_of
from lightning_peft.schemas import CONF_DIR, ROOTS

SHELLS = {
    "bash": """_lightning_peft() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##*[[:space:]]}" key files
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "@commands@" -- "$word"))
        return
    fi
    key="${word%"${word##*=}"}"
    files=($(compgen -f -- "${word##*=}"))
    COMPREPLY=($(compgen -W "@words@" -- "$word") "${files[@]/#/$key}")
    # Where = divides words, what is completed is what stands behind it.
    [[ "$COMP_WORDBREAKS" == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"$key"}")
    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
}
complete -F _lightning_peft lightning-peft
""",
    "zsh": """#compdef lightning-peft
_lightning_peft() {
    if (( CURRENT == 2 )); then
        compadd -- @commands@
    else
        compadd -S '' -- @keys@
        compadd -- @options@
        compset -P '*='
        _files
    fi
}
compdef _lightning_peft lightning-peft
""",
    "fish": """complete -c lightning-peft -n __fish_use_subcommand -f -a "@commands@"
complete -c lightning-peft -n "not __fish_use_subcommand" -a "@words@"
""",
}


def completion(words: list[str]) -> None:
    """Print the script of a shell. Raises ValueError for an unknown shell."""
    if len(words) != 1 or words[0] not in SHELLS:
        raise ValueError(f"completion: name a shell, one of {', '.join(SHELLS)}; got {' '.join(words) or 'none'}")
    script, known = SHELLS[words[0]], all_words()
    keys = [word for word in known if word.endswith("=")]
    lists = {"commands": list(COMMANDS), "words": known, "keys": keys, "options": [w for w in known if w not in keys]}
    for name, entries in lists.items():
        script = script.replace(f"@{name}@", " ".join(entries))
    print(script, end="")


def all_words() -> list[str]:
    """Return group=option for every option file, and key= for every key."""
    groups = sorted(path for path in CONF_DIR.iterdir() if path.is_dir())
    options = [
        f"{group.name}={path.relative_to(group).with_suffix('')}"
        for group in groups
        for path in sorted(group.glob("**/*.yaml"))
    ]
    keys = {option.key for root in ROOTS.values() for option in options_of(root)} | set(TRAINER)
    keys |= {option.key for option in every_option()}
    return [*options, *(f"{key}=" for key in sorted(keys))]
