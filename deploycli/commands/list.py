"""deploycli list."""

from __future__ import annotations

import click

from deploycli.options import json_option


@click.command("list")
@click.argument("pattern", required=False)
@json_option
def command(pattern: str | None, as_json: bool) -> int:
    """List the models that have a name; PATTERN is a part of a name, or a glob.

    \b
    Examples:
      deploycli list
      deploycli list 'swin_*_384'
    """
    from deploycli.models.errors import UsageError
    from deploycli.models.registry import variants
    from deploycli.render import print_json, show_variants

    found = variants(pattern)
    if not found:
        raise UsageError(f"no model matches {pattern!r}", hint="deploycli list, for all of them")
    if as_json:
        print_json(
            [
                {
                    "name": variant.name,
                    "aliases": list(variant.aliases),
                    "summary": variant.summary,
                    "spec": variant.spec.to_json(),
                    "preprocessing": variant.preprocessing and variant.preprocessing.to_json(),
                    "pretrained": variant.pretrained and variant.pretrained.repo,
                }
                for variant in found
            ]
        )
    else:
        show_variants(found)
    return 0
