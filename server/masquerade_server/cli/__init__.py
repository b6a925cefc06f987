"""The `masquerade` command. Modules of heavy commands are imported when they run: `--help` takes 0.2 s."""

from __future__ import annotations

import sys

import typer

from masquerade_client import MasqueradeError as ClientError
from masquerade_engine.threads import yield_at_barriers
from masquerade_masks import MasqueradeError, SettingError
from masquerade_server import __version__
from masquerade_server.cli import bench, chat, doctor, eval, export, personas, prior, sculpt, serve, worker

__all__ = ["app", "main"]

app = typer.Typer(
    name="masquerade",
    help="""One base model, a thousand masks: sculpt and serve persona sub-networks of one language model.

    \b
    masquerade serve                       start the server
    masquerade chat pip                    talk to a ready persona
    masquerade personas create witch.txt   sculpt one of your own
    masquerade doctor                      what is here, what is missing
    """,
    epilog="Settings are flags, MASQUERADE_* environment variables, or a TOML file (--config), in that order.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("sculpt")(sculpt.sculpt)
app.command("chat")(chat.chat)
app.add_typer(personas.app, name="personas")
app.command("eval")(eval.evaluate)
app.command("export")(export.export)
app.command("prior")(prior.prior)
app.command("doctor")(doctor.doctor)
app.command("worker")(worker.worker)
app.command("bench")(bench.bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"masquerade {__version__}")
        raise typer.Exit


@app.callback()
def _masquerade(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show it."),
) -> None: ...


def main() -> None:
    """Run the command line; what goes wrong is one sentence on standard error.

    Exit status: 0, 1 for what failed, 2 for wrong usage or settings, 130 for an interruption.
    """
    yield_at_barriers()
    try:
        app()
    except SettingError as error:
        _fail(error, 2)
    except (MasqueradeError, ClientError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: Exception, status: int) -> None:
    typer.secho(f"masquerade: {error}", fg=typer.colors.RED, err=True)
    sys.exit(status)
