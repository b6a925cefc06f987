"""`masquerade prior`: what all personas of a base share, learned once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from masquerade_engine.threads import available_cores
from masquerade_server.cli import options
from masquerade_server.cli.progress import SculptDisplay
from masquerade_server.logs import quiet_transformers

Sparsities = Annotated[
    list[float], typer.Option("--sparsity", help="Learn scores for this sparsity; give it again for more.")
]
Steps = Annotated[int, typer.Option(help="Learning steps for each sparsity, of 16 answers each.", min=1)]
Instructions = Annotated[Path | None, typer.Option(help="Questions of your own, in Alpaca format (.json or .jsonl).")]
Recovery = Annotated[
    str, typer.Option(help="vectors or lora: not scores, but what such recoveries start from, on top of their masks.")
]
Blend = Annotated[
    float, typer.Option(help="Start this share of the way to the next sparser scores, out of a mask that has settled.")
]
FromScratch = Annotated[bool, typer.Option("--from-scratch", help="Start from importances, not the prior there is.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the prior here, not where sculpts look for it.")
]


def prior(
    sparsity: Sparsities = [0.25, 0.5],  # noqa: B006  (typer reads it)
    steps: Steps = 240,
    recovery: Recovery = "none",
    blend: Blend = 0.0,
    from_scratch: FromScratch = False,
    instructions: Instructions = None,
    output: Output = None,
    config: options.Config = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Learn a base's prior: what every sculpt on it starts from.

    \b
    masquerade prior --model ./Llama-3.2-1B-Instruct       once, before its first sculpt
    masquerade prior --sparsity 0.35 --steps 400
    masquerade prior --sparsity 0.25 --blend 0.4           one more round, from elsewhere
    masquerade prior --recovery lora                       then, for sculpts with --recovery lora or full

    Twelve reference personas answer the instruction set, and one mask is learned for all of them. Sculpts then need
    fewer steps, and their masks overlap. The bundled model's prior ships. Where the base has one, that is learned
    further, from other answers. Interrupted, the same command goes on.
    """
    settings = options.settings_of(config, cache_dir=cache_dir, model=model, dtype=dtype, device=device)
    from masquerade_pruner.instructions import load_instructions  # noqa: PLC0415
    from masquerade_pruner.prior import prior_of, prior_path  # noqa: PLC0415  (torch)
    from masquerade_pruner.prior_learning import PriorSettings, learn_prior  # noqa: PLC0415

    asked = load_instructions(instructions)
    wanted = PriorSettings(tuple(sparsity), steps, recovery=recovery, blend=blend)  # type: ignore[arg-type]
    import torch  # noqa: PLC0415

    from masquerade_engine.base import load_base  # noqa: PLC0415

    torch.set_num_threads(available_cores())
    quiet_transformers()
    base = load_base(settings.model, cache_dir=settings.cache_dir, dtype=settings.dtype, device=settings.device)
    out = prior_path(base, settings.cache_dir) if output is None else output
    workdir = out.with_suffix(".work")
    with SculptDisplay("prior") as display:
        learn_prior(
            base,
            workdir,
            out,
            wanted,
            start=None if from_scratch else prior_of(base, settings.cache_dir),
            instructions=asked,
            progress=lambda at: display.show(
                at.stage, at.completed, at.total, eta_s=at.eta_s, loss=at.loss, message=at.message
            ),
        )
    shutil.rmtree(workdir, ignore_errors=True)
    typer.echo(out)
