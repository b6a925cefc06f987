"""`masquerade sculpt`: on this machine, without a server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from masquerade_engine.threads import available_cores
from masquerade_masks import MaskFile, MaskHeader, attached_file
from masquerade_masks.mask_file import write
from masquerade_masks.registry import SQLiteRegistry, utc_now
from masquerade_masks.store import PersonaFiles, write_json_atomic
from masquerade_server.cli import options
from masquerade_server.cli.persona_text import id_of, name_of, read_text
from masquerade_server.cli.progress import SculptDisplay
from masquerade_server.logs import quiet_transformers
from masquerade_server.teachers import open_teacher

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_pruner import SculptResult, SculptSpec
    from masquerade_server.settings import Settings

Text = Annotated[str, typer.Argument(help="A file with the persona's text; - reads standard input.")]
Name = Annotated[str | None, typer.Option(help="The persona's name; by default made from the file's.")]
Id = Annotated[str | None, typer.Option(help="Its id; by default made from the name.")]
Sparsity = Annotated[float, typer.Option(help="Share of FFN neurons to drop, above 0 to 0.9.")]
Preset = Annotated[str, typer.Option(help="Effort: smoke (a try-out), default or thorough.")]
Teacher = Annotated[str, typer.Option(help="Who writes the answers: base, or remote with --teacher-url and the like.")]
Recovery = Annotated[str, typer.Option(help="What is trained on top of the mask: none, vectors, lora or full.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same mask on the same machine.", min=0)]
Instructions = Annotated[Path | None, typer.Option(help="Questions of your own, in Alpaca format (.json or .jsonl).")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the mask, its report and its examples.")]
Publish = Annotated[
    bool, typer.Option("--publish", help="Register it in the data directory too; a running server serves it.")
]


def sculpt(
    text: Text,
    name: Name = None,
    id: Id = None,
    sparsity: Sparsity = 0.25,
    preset: Preset = "default",
    recovery: Recovery = "none",
    teacher: Teacher = "base",
    seed: Seed = 0,
    instructions: Instructions = None,
    output: Output = Path(),
    publish: Publish = False,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.SculptDevice = None,
    checkpointing: options.Checkpointing = None,
    micro_batch: options.MicroBatch = None,
    teacher_url: options.TeacherUrl = None,
    teacher_model: options.TeacherModel = None,
    teacher_api_key: options.TeacherKey = None,
    teacher_concurrency: options.TeacherConcurrency = None,
    teacher_timeout_s: options.TeacherTimeout = None,
) -> None:
    """Learn a persona's mask on this machine.

    \b
    masquerade sculpt witch.txt                              writes witch.safetensors, witch.report.json, ...
    masquerade sculpt witch.txt --name "Old Nettie" --sparsity 0.5 -o masks
    masquerade sculpt witch.txt --publish                    and serve it from the data directory

    Interrupted, the same command goes on where it was. What the device cannot hold is refused before it starts.
    """
    settings = options.settings_of(
        config,
        data_dir=data_dir,
        cache_dir=cache_dir,
        model=model,
        dtype=dtype,
        sculpt_device=device,
        sculpt_checkpointing=checkpointing,
        sculpt_micro_batch=micro_batch,
        teacher_url=teacher_url,
        teacher_model=teacher_model,
        teacher_api_key=teacher_api_key,
        teacher_concurrency=teacher_concurrency,
        teacher_timeout_s=teacher_timeout_s,
    )
    persona_name, persona_text = name_of(text, name), read_text(text)
    persona_id = id_of(persona_name, id)
    from masquerade_pruner import SculptSpec  # noqa: PLC0415  (torch: seconds of import)

    spec = SculptSpec(
        persona_id=persona_id,
        name=persona_name,
        text=persona_text,
        sparsity=sparsity,
        preset=preset,
        recovery=cast(Any, recovery),
        seed=seed,
        teacher=teacher,
        instructions=instructions,
    )
    from masquerade_engine.base import load_base  # noqa: PLC0415

    quiet_transformers()
    base = load_base(settings.model, cache_dir=settings.cache_dir, dtype=settings.dtype, device=settings.sculpt_device)
    output.mkdir(parents=True, exist_ok=True)
    workdir = output / f".{persona_id}.sculpt"
    result = _sculpt(spec, base, workdir, settings)
    written = _write(result, spec, output)
    if publish:
        _publish(result, spec, base, settings)
    shutil.rmtree(workdir, ignore_errors=True)
    _summarise(result, written)


def _sculpt(spec: SculptSpec, base: Base, workdir: Path, settings: Settings) -> SculptResult:
    import torch  # noqa: PLC0415

    from masquerade_pruner import Execution  # noqa: PLC0415
    from masquerade_pruner import sculpt as run  # noqa: PLC0415

    execution = Execution(cast(Any, settings.sculpt_checkpointing), settings.sculpt_micro_batch or None)
    torch.set_num_threads(available_cores())
    with (
        open_teacher(spec.teacher, settings.teacher, settings.data_dir) as teacher,
        SculptDisplay(spec.persona_id) as display,
    ):
        return run(
            spec,
            base,
            workdir,
            cache_dir=settings.cache_dir,
            execution=execution,
            teacher=teacher,
            progress=lambda at: display.show(
                at.stage,
                at.completed,
                at.total,
                eta_s=at.eta_s,
                loss=at.loss,
                message=at.message,
                dropped=at.dropped,
            ),
        )


def _mask_file(result: SculptResult, spec: SculptSpec) -> MaskFile:
    header = MaskHeader(
        persona=spec.persona_id,
        version=1,
        recovery=result.recovery,
        prompt_sha256=result.prompt_sha256,
        settings=result.settings,
        created=utc_now(),
    )
    return MaskFile(result.subnetwork, header)


def _write(result: SculptResult, spec: SculptSpec, output: Path) -> list[Path]:
    mask, report, examples = (
        output / f"{spec.persona_id}.{suffix}" for suffix in ("safetensors", "report.json", "examples.jsonl")
    )
    written = [mask, report, examples]
    weights = result.subnetwork.weights
    if weights is not None:
        attached = output / f"{spec.persona_id}.{attached_file.file_name(weights.digest)}"
        attached_file.write(attached, weights)
        written.append(attached)
    write(mask, _mask_file(result, spec))
    write_json_atomic(report, result.report)
    shutil.copyfile(result.examples_path, examples)
    return written


def _publish(result: SculptResult, spec: SculptSpec, base: Base, settings: Settings) -> None:
    from masquerade_server.publishing import Publication, register  # noqa: PLC0415

    publication = Publication(
        persona_id=spec.persona_id,
        text=spec.text,
        system_prompt=result.system_prompt,
        mask_file=_mask_file(result, spec),
        source="sculpt",
        report=result.report,
        examples=result.examples_path,
    )
    with SQLiteRegistry(settings.data_dir / "registry.sqlite") as registry:
        files = PersonaFiles(settings.data_dir)
        version = register(registry, files, publication, name=spec.name, base=base.fingerprint)
    typer.echo(f"{spec.persona_id}, version {version.number}, is published in {settings.data_dir}")


def _summarise(result: SculptResult, written: list[Path]) -> None:
    for path in written:
        typer.echo(path)
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    typer.echo(f"time: {spent}")
    if (figures := _headline(result.report)) is not None:
        typer.echo(figures)


def _headline(report: dict[str, Any]) -> str | None:
    """The report's first figures, where it has them."""
    figures = report.get("one_turn", {}).get("all")
    if figures is None:
        return None
    measure, rival, closed = report["measure"], report["strongest_baseline"], figures["gap_closed"]["mean"]
    what = "KL to the dense persona" if measure == "kl" else "NLL of the teacher's answers"
    theirs = figures[f"baseline_{measure}"][rival]["mean"]
    against = f"{theirs:.3f} of the {rival} baseline ({closed:.0%} of the gap closed)"
    return f"held-out {what}: {figures[measure]['mean']:.3f} nats a token, against {against}"
