"""The `deploy` command: a table of verbs, each loaded only when it is called, and one place for errors."""

import importlib
import os
import sys
from typing import Any

import click

COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("deploy.cli.init:command", "Looks at a model, writes a commented deploy.toml that builds."),
    "plan": ("deploy.cli.plan:command", "What a build would do for a target, and why."),
    "build": ("deploy.cli.build:command", "Prune, quantize, export, validate and measure; ship the best."),
    "validate": ("deploy.cli.validate:command", "Files, golden pair, latency and memory of a build again."),
    "prune": ("deploy.cli.prune:command", "A training checkpoint comes back smaller, ready to train on."),
    "serve": ("deploy.cli.serve:command", "Answers requests with finished builds: Open Inference v2."),
    "bundle": ("deploy.cli.bundle:command", "What a server ships, from a finished build."),
    "compare": ("deploy.cli.compare:command", "What changed between two builds."),
    "targets": ("deploy.cli.targets:command", "The catalogue of hardware, and the profile of this machine."),
    "doctor": ("deploy.cli.doctor:command", "What this machine lacks, and the fix for each lack."),
    "cache": ("deploy.cli.cache:command", "How large the cache is, what is in it; check it, empty it."),
}


class LazyGroup(click.Group):
    """Lists commands from the table; imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, None when there is no such verb."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs with their one line, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown verb is told the nearest."""
        from targets.errors import nearest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = nearest(args[0], list(COMMANDS), 1)[0]
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {close!r}?", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edge-deploy", prog_name="deploy")
def cli() -> None:
    """Deploys PyTorch models to the edge: the target chooses the compression, and every promise is measured.

    \b
    deploy plan --target galaxy-s22
    deploy build --target galaxy-s22
    """


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with the documented code."""
    # Threads that spin while they wait make a shared machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code; a bug keeps its traceback."""
    try:
        code: Any = cli.main(args=arguments, prog_name="deploy", standalone_mode=False)
    except click.ClickException as error:
        return _fail("usage", error.format_message(), 2, arguments)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort as error:
        if isinstance(error.__cause__, EOFError):  # click takes any EOFError for the end of the input
            raise error.__cause__ from None
        return _interrupted(arguments)
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except SystemExit as error:
        what = f"The model's or the project's code called sys.exit; found SystemExit: {error.code}."
        return _fail("model", f"{what} Remove that call, or keep it out of forward.", 4, arguments)
    except MemoryError as error:
        what = f"The memory is used up{f': {error}' if str(error) else ''}."
        return _fail("environment", f"{what} Use smaller data or a smaller dynamic.NAME.max.", 3, arguments)
    except Exception as error:
        from targets.errors import DeployError

        if not isinstance(error, DeployError):
            raise
        return _fail(error.kind, error.message, error.exit_code, arguments)
    return code if isinstance(code, int) else 0


def _interrupted(arguments: list[str]) -> int:
    message = "Interrupted; the last good build is as it was. Run the same command again to go on from here."
    return _fail("interrupted", message, 130, arguments)


def _fail(kind: str, message: str, exit_code: int, arguments: list[str]) -> int:
    """One message: JSON on stdout when --json was asked for, else text on stderr."""
    if "--json" in arguments:
        import json

        click.echo(json.dumps({"error": {"kind": kind, "message": message, "exit_code": exit_code}}))
    else:
        click.echo(f"deploy: {message}", err=True)
    return exit_code


if __name__ == "__main__":
    main()
