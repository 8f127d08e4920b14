"""The bash that counts starts of a job which leave no checkpoint behind: it would start again for ever."""

STALLS = """\
# A third start in a row stalls that ends before a checkpoint: `written` lists what it listed at the beginning.
stalls() {
  local starts=$run_dir/starts_without_checkpoint
  if [ "$(written)" != "$checkpoints" ]; then rm -f "$starts"; else date >> "$starts"; fi
  [ -e "$starts" ] && [ "$(wc -l < "$starts")" -ge 3 ] || return 1
  rm "$starts"
  echo "error: three starts in a row had to leave before a checkpoint: give {remedy}"
}
"""
"""A function of bash, over `run_dir`, `written` and `checkpoints`; `{remedy}` is to be filled in by `replace`."""


def stalls(remedy: str) -> str:
    """Return the function `stalls`, which names the remedy and succeeds where the job is to give up."""
    return STALLS.replace("{remedy}", remedy)
