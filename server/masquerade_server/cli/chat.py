"""`masquerade chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from masquerade_client import Masquerade, Message
from masquerade_server.cli import options

Persona = Annotated[
    str, typer.Argument(help="A persona's id; id@2 for a version, id@dense for its prompt on the unpruned base.")
]
Text = Annotated[str | None, typer.Argument(help="Say this, print the answer and end; - reads standard input.")]
Scene = Annotated[
    str | None, typer.Option("--scene", help="Where the conversation takes place, told to the persona alone.")
]
MaxTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0, max=2)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]

_HELP = "/forget starts over, /who shows the persona, /quit leaves (as does Ctrl-D)."


def chat(
    persona: Persona,
    text: Text = None,
    scene: Scene = None,
    max_tokens: MaxTokens = 300,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Talk to a persona of a running server.

    \b
    masquerade chat pip                                        a conversation
    masquerade chat pip "What are you building?"               one answer
    masquerade chat pip@dense "What are you building?"         the same prompt on the unpruned base
    masquerade chat pip --scene "A market square at night."
    """
    opening = [Message("system", scene)] if scene else []
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with Masquerade(url, api_key=api_key) as client:
        conversation = Conversation(client, persona, opening, sampling)
        if text is not None:
            conversation.say(sys.stdin.read() if text == "-" else text)
        else:
            client.models.get(persona)  # a misspelt id is told before anyone types
            _converse(conversation)


class Conversation:
    """The turns so far, and how the next is asked for."""

    def __init__(
        self, client: Masquerade, persona: str, opening: list[Message], sampling: dict[str, float | int | None]
    ) -> None:
        self.client = client
        self.persona = persona
        self._opening = opening
        self._turns = list(opening)
        self._sampling = {name: value for name, value in sampling.items() if value is not None}

    def say(self, text: str) -> None:
        """Print the answer as it is written and remember both turns."""
        turns = [*self._turns, Message("user", text)]
        with self.client.chat.stream(self.persona, turns, **self._sampling) as stream:  # type: ignore[arg-type]
            for chunk in stream:
                typer.echo(chunk.text, nl=False)
            reply = stream.result()
        typer.echo()
        self._turns = [*turns, Message("assistant", reply.text)]

    def forget(self) -> None:
        """Start over, in the same scene."""
        self._turns = list(self._opening)


def _converse(conversation: Conversation) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(f"[dim]Talking to {conversation.persona}. {_HELP}[/dim]")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            console.print()
            return
        match text:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/forget":
                conversation.forget()
                console.print("[dim]A new conversation.[/dim]")
            case "/who":
                persona = conversation.client.personas.get(conversation.persona.partition("@")[0])
                console.print(persona.system_prompt, markup=False)
            case _ if text.startswith("/"):
                console.print(f"[dim]{_HELP}[/dim]")
            case _:
                _say(conversation, text, console)


def _say(conversation: Conversation, text: str, console: Console) -> None:
    """One turn; Ctrl-C cuts the answer short, and the conversation goes on."""
    try:
        conversation.say(text)
    except KeyboardInterrupt:
        console.print("\n[dim](cut short)[/dim]")
