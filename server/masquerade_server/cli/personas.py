"""`masquerade personas`: the personas of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from masquerade_client import Masquerade, Persona
from masquerade_server.cli import options
from masquerade_server.cli.persona_text import name_of, read_text
from masquerade_server.cli.progress import SculptDisplay

app = typer.Typer(
    help="""The personas of a running server: list, show, create, change, watch, warm, roll back, delete.

    \b
    masquerade personas                                      list them
    masquerade personas create witch.txt --name "Old Nettie" sculpt one, with progress
    masquerade personas update witch --text witch-2.txt      a new version; the old one serves meanwhile
    masquerade personas rollback witch                       the version before
    masquerade personas warm witch smith                     ready before a player comes
    """,
    invoke_without_command=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Id = Annotated[str, typer.Argument(help="The persona's id.")]
Sparsity = Annotated[float | None, typer.Option(help="Share of FFN neurons to drop, above 0 to 0.9 (0.25).")]
Preset = Annotated[str | None, typer.Option(help="Effort: smoke, default or thorough.")]
Recovery = Annotated[str | None, typer.Option(help="Trained on top of the mask: none, vectors, lora or full.")]
Teacher = Annotated[
    str | None, typer.Option(help="Who writes the answers: base, or remote where the server has one configured.")
]
Seed = Annotated[int | None, typer.Option(help="Of the sculpt's randomness.")]
Cast = Annotated[str | None, typer.Option(help="The game or tenant it belongs to.")]
Wait = Annotated[bool, typer.Option(help="Watch until the mask is published; leaving stops nothing.")]
Number = Annotated[int | None, typer.Option("--version", help="The version; by default the one that serves.")]


@app.callback()
def personas(
    context: typer.Context, cast: Cast = None, url: options.Url = None, api_key: options.ApiKey = None
) -> None:
    context.obj = (url, api_key)
    if context.invoked_subcommand is None:
        _list(context, cast)


@app.command("list")
def list_(context: typer.Context, cast: Cast = None) -> None:
    """All personas, with what serves each."""
    _list(context, cast)


@app.command()
def show(context: typer.Context, persona: Id) -> None:
    """One persona: its prompt, versions and job."""
    with _client(context) as client:
        found = client.personas.get(persona)
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for label, value in _details(found):
        table.add_row(f"[dim]{label}[/dim]", value)
    console.print(table)


@app.command()
def create(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="A file with the persona's text; - reads standard input.")],
    name: Annotated[str | None, typer.Option(help="Its name; by default made from the file's.")] = None,
    id: Annotated[str | None, typer.Option(help="Its id; by default made from the name.")] = None,
    sparsity: Sparsity = None,
    preset: Preset = None,
    recovery: Recovery = None,
    teacher: Teacher = None,
    seed: Seed = None,
    cast: Cast = None,
    wait: Wait = True,
) -> None:
    """Create a persona and sculpt it; it answers at once from the unpruned base, then from its own sub-network."""
    options = _given(sparsity=sparsity, preset=preset, recovery=recovery, teacher=teacher, seed=seed, cast=cast)
    with _client(context) as client:
        persona = client.personas.create(name=name_of(text, name), text=read_text(text), id=id, **options)
        typer.echo(f"{persona.id} answers from the unpruned base while its mask is learned.")
        if wait:
            _watch(client, persona.id, after=0)


@app.command()
def update(
    context: typer.Context,
    persona: Id,
    text: Annotated[str | None, typer.Option(help="A file with the new text; - reads standard input.")] = None,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    sparsity: Sparsity = None,
    preset: Preset = None,
    recovery: Recovery = None,
    teacher: Teacher = None,
    seed: Seed = None,
    sculpt: Annotated[bool, typer.Option(help="Learn a new mask; otherwise the present one is kept.")] = True,
    wait: Wait = True,
) -> None:
    """Change a persona. A new version is sculpted while the old one serves."""
    new_text = None if text is None else read_text(text)
    options = _given(sparsity=sparsity, preset=preset, recovery=recovery, teacher=teacher, seed=seed)
    with _client(context) as client:
        client.personas.update(persona, name=name, text=new_text, sculpt=sculpt, **options)
        if sculpt and wait:
            _watch(client, persona, after=0)


@app.command()
def watch(context: typer.Context, persona: Id) -> None:
    """Follow a running sculpt to its end; leaving stops nothing."""
    with _client(context) as client:
        _watch(client, persona)


@app.command()
def cancel(context: typer.Context, persona: Id) -> None:
    """Stop a sculpt; an earlier version goes on serving."""
    with _client(context) as client:
        client.personas.cancel(persona)
    typer.echo(f"The sculpt of {persona} is stopping.")


@app.command()
def rollback(
    context: typer.Context, persona: Id, version: Annotated[int, typer.Argument(help="The version to serve.")]
) -> None:
    """Serve an earlier version again, with its text."""
    with _client(context) as client:
        client.personas.rollback(persona, version)
    typer.echo(f"{persona} serves version {version}.")


@app.command()
def warm(
    context: typer.Context,
    personas: Annotated[list[str], typer.Argument(help="Ids; witch@3 and witch@dense are ids too.")],
    pin: Annotated[bool, typer.Option("--pin", help="Keep them ready until another version is served.")] = False,
) -> None:
    """Make prompts and weights ready before anybody speaks to them."""
    with _client(context) as client:
        for one in client.personas.warm(personas, pin=pin):
            serves = "the unpruned base" if one.version is None else f"version {one.version}"
            typer.echo(f"{one.id} is ready: {serves}, {one.prompt_tokens} tokens ({one.cached_tokens} were before)")


@app.command()
def delete(
    context: typer.Context,
    persona: Id,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a persona with all its versions."""
    if not yes:
        typer.confirm(f"Delete {persona} and all its versions?", abort=True)
    with _client(context) as client:
        client.personas.delete(persona)
    typer.echo(f"{persona} is deleted.")


@app.command()
def download(
    context: typer.Context,
    persona: Id,
    output: Annotated[Path, typer.Argument(help="Where to write the mask file.")],
    version: Number = None,
) -> None:
    """Save a version's mask file (safetensors)."""
    with _client(context) as client:
        data = client.personas.download_mask(persona, version=version)
    output.write_bytes(data)
    typer.echo(f"{output}: {len(data)} bytes")


@app.command()
def upload(
    context: typer.Context,
    persona: Id,
    mask: Annotated[Path, typer.Argument(help="A mask file made for this server's base.", exists=True)],
) -> None:
    """Install a mask file as the next version."""
    with _client(context) as client:
        found = client.personas.upload_mask(persona, mask)
    typer.echo(f"{persona} serves version {found.version}.")


def _client(context: typer.Context) -> Masquerade:
    url, api_key = context.obj
    return Masquerade(url, api_key=api_key)


def _list(context: typer.Context, cast: str | None) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "name", "serves", "sparsity", "job"):
        table.add_column(column)
    with _client(context) as client:
        for persona in client.personas.list(cast=cast):
            table.add_row(persona.id, persona.name, _serves(persona), _sparsity(persona), _job(persona))
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    else:
        console.print("No personas yet: masquerade personas create witch.txt")


def _watch(client: Masquerade, persona_id: str, after: int | None = None) -> None:
    with SculptDisplay(persona_id) as display, client.personas.watch(persona_id, after=after) as stream:
        for event in stream:
            if event.stage is not None:
                display.show(
                    event.stage,
                    event.completed,
                    event.total,
                    eta_s=event.eta_s,
                    loss=event.loss,
                    message=event.message,
                    dropped=event.data.get("dropped") or 0,
                )
        persona = stream.result()
    typer.echo(f"{persona.id} serves version {persona.version}: masquerade chat {persona.id}")


def _details(persona: Persona) -> list[tuple[str, str]]:
    rows = [
        ("id", persona.id),
        ("name", persona.name),
        ("serves", _serves(persona)),
        ("job", _job(persona)),
        ("cast", persona.cast or ""),
        ("prompt", persona.system_prompt or ""),
    ]
    for version in persona.versions:
        kept = f"{version.kept} of {version.intermediate_size} neurons a layer"
        rows.append((f"version {version.number}", f"{kept}, {version.source}, {version.created}"))
    return [(label, value) for label, value in rows if value]


def _serves(persona: Persona) -> str:
    if persona.serving == "base":
        return "unpruned base"
    return f"version {persona.version}" + (" (other text)" if persona.flagged else "")


def _sparsity(persona: Persona) -> str:
    actual = persona.mask.sparsity if persona.mask is not None else persona.sparsity
    return "" if actual is None else f"{actual:.0%}"


def _job(persona: Persona) -> str:
    job = persona.job
    if job is None or job.status == "succeeded":
        return ""
    if job.status == "running" and job.stage:
        return f"{job.stage} {job.completed}/{job.total}"
    if job.status == "queued" and job.queue_position:
        return f"queued behind {job.queue_position}"
    return job.status + (f": {job.error}" if job.error else "")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
