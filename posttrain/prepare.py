"""Prepare the rows of a stage ahead of a run, or delete prepared rows.

usage: posttrain data prepare [stage=sft|reward|ppo|dpo] [recipes=...] [key=value ...]
       posttrain data prune [output_dir=...] [data.cache_dir=...]

prepare reads, checks and tokenises the rows that the same words name for
`posttrain run`, and keeps them in <output_dir>/.cache, or data.cache_dir: every
run on the same rows, on any number of devices, then starts from there. It needs
the model's tokenizer, no weights and no GPU.
prune deletes what has been prepared, and nothing else; a run makes it again.

examples:
  posttrain data prepare stage=sft data.dataset_name=mine.jsonl data.num_proc=16
  posttrain data prune output_dir=outputs
"""

import sys
from collections.abc import Sequence

from posttrain.cli.command import parse, read_command
from posttrain.cli.entry import entry_point
from posttrain.config.stages import STAGES
from posttrain.config.suggest import nearest
from posttrain.console import say
from posttrain.data.hashes import cache_of
from posttrain.errors import ConfigError


def main() -> None:
    """The entry point of `posttrain data`."""
    entry_point("prepare", lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    from posttrain.train import prepare_stage

    word, *rest = arguments or [""]
    if word.startswith("-"):
        parse(arguments)  # names the flag
    keys = [override.key_or_group for override in parse(rest).overrides]
    if word == "prepare":
        if without := sorted({"dry_run", "overwrite", "move_aside"} & set(keys)):
            raise ConfigError(f"{without[0]} is for a run; posttrain data prepare trains nothing")
        prepare_stage(read_command(rest, list(STAGES)).config)
    elif word == "prune":
        if unread := [key for key in keys if key not in ("output_dir", "data.cache_dir")]:
            raise ConfigError(f"{unread[0]}: posttrain data prune takes output_dir and data.cache_dir alone")
        from posttrain.data.prepared import prune

        folder = cache_of(read_command(rest, None).config)
        count, size = prune(folder)
        say(f"{count} prepared data sets deleted from {folder}, {size / 1e6:,.1f} MB")
    else:
        known = ("prepare", "prune")
        raise ConfigError(f"posttrain data {word}: {' or '.join(known)} is needed{nearest(word, known)}")


if __name__ == "__main__":
    main()
