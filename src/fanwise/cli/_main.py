"""The group of commands, which are imported when they are run and not before."""

from importlib import import_module

import click

from fanwise import Exit, __version__

# What each command is and where it lives. Listed here so that --help imports none of them.
COMMANDS = {
    "watch": ("fanwise.cli._watch:command", "Print what changes below a directory."),
    "health": ("fanwise.cli._health:command", "Say whether filesystems break, and follow it."),
    "lab": ("fanwise.cli._lab:command", "Run design debates as models, and see which break."),
    "doctor": ("fanwise.cli._doctor:command", "Say what can be watched here, and what cannot."),
    "config": ("fanwise.cli._config:command", "Show, check or print the configuration."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", metavar="FILE", help="Read this configuration file and no other.")
@click.version_option(__version__, message="fanwise %(version)s")
@click.pass_context
def _group(ctx: click.Context, config: str | None) -> None:
    """Filesystem notification for Linux without silent loss."""
    ctx.obj = config  # commands hand it to fanwise.config.load()


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status, which the command returned (None is 0)."""
    try:
        # Not click's own main(): it turns a closed pipe into 1 and an interrupt into its own error.
        with _group.make_context("fanwise", arguments) as ctx:
            return int(_group.invoke(ctx) or Exit.OK)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return Exit.USAGE if isinstance(error, click.UsageError) else Exit.FAILED
