"""A MkDocs hook: put the flags of the training commands, read from their parsers, into docs/use/flags.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from enact_common.variants import VARIANTS, load_variant

PLACE = "<!-- flags -->"


def flag_tables() -> str:
    """One Markdown table per group of flags; a default that differs between the variants is given for each."""
    groups: dict[str, dict[str, list]] = {}
    for variant in VARIANTS:
        for group in load_variant(variant).main.get_args_parser()._action_groups:
            for action in group._group_actions:
                if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help":
                    flag = next(name for name in action.option_strings if name.startswith("--"))
                    groups.setdefault(group.title, {}).setdefault(flag, []).append((variant, action))
    lines = []
    for title, flags in groups.items():
        lines += [f"### {title[0].upper()}{title[1:]}", "", "| flag | what it does | default |", "|---|---|---|"]
        for flag, found in flags.items():
            defaults = {variant: readable(action.default) for variant, action in found}
            same = len(set(defaults.values())) == 1
            default = next(iter(defaults.values())) if same else ", ".join(f"{v}: {d}" for v, d in defaults.items())
            only = "" if len(found) == len(VARIANTS) else f" ({', '.join(variant for variant, _ in found)} only)"
            text = found[0][1].help.replace("|", "\\|").replace("%%", "%")
            lines.append(f"| `{flag}`{only} | {text} | {default} |")
        lines.append("")
    return "\n".join(lines)


def readable(default) -> str:
    if default is None or default == "":
        return "none"
    if default is False:
        return "off"
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default))
    return str(default)


def on_page_markdown(markdown: str, **kwargs) -> str:
    return markdown.replace(PLACE, flag_tables()) if PLACE in markdown else markdown
