"""``fanwise config``: show, check or print the configuration."""

import sys

import click
import msgspec

from fanwise import config


@click.group()
def command() -> None:
    """Show, check or print the configuration."""


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def show(file: str | None, as_json: bool) -> None:
    """Show every value in effect and where it came from."""
    loaded = config.load(file)
    values = {
        f"{section}.{name}": value
        for section, names in msgspec.to_builtins(loaded.config).items()
        for name, value in names.items()
    }
    if as_json:
        document = {
            "version": 1,
            "file": None if loaded.file is None else str(loaded.file),
            "values": {
                key: {"value": value, "from": loaded.origins[key]} for key, value in values.items()
            },
        }
        click.echo(msgspec.json.encode(document))
        return
    for key, value in values.items():
        click.echo(f"{key} = {msgspec.json.encode(value).decode()}  # {loaded.origins[key]}")


@command.command()
@click.argument("file", required=False)
@click.pass_obj
def check(chosen: str | None, file: str | None) -> None:
    """Check FILE, or the configuration in effect, the environment included."""
    if file is not None:
        config.check(file)
        click.echo(f"{file}: fine")
        return
    loaded = config.load(chosen)
    click.echo(f"{loaded.file}: fine" if loaded.file else "no configuration file; defaults apply")


@command.command()
def default() -> None:
    """Print a commented file that holds the defaults."""
    sys.stdout.write(config.DEFAULT_FILE)
