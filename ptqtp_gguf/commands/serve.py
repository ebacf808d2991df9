"""What serves a file to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..llamacpp import adapter
from ..serve import Server, is_loopback
from ..terminal import err_console, event, line
from .common import AsJson, Grammar, JsonSchema, Lora, Quiet, Rpc, RpcLayers, reporter


def serve(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTIONS", help="Further options of llama-server, behind a --.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 = any free one.")] = 8080,
    ctx: Annotated[int, typer.Option(min=0, help="Tokens of context of a request; 0 = as trained, at most 4096.")] = 0,
    threads: Annotated[int, typer.Option("--threads", "-j", min=0, help="Threads; 0 = llama.cpp's default.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 1,
    expose: Annotated[bool, typer.Option("--expose", help="Allow a --host that other machines can reach.")] = False,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Clients must send a key of this file, one a line. Or set LLAMA_API_KEY.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="The model's name for clients; else the file's.")] = None,
    log: Annotated[Path | None, typer.Option(help="Append the server's log to this file.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Answer /v1/embeddings.")] = False,
    pooling: Annotated[
        str | None, typer.Option(help="How a text becomes one vector: mean, last, cls, none; else as the file says.")
    ] = None,
    reranking: Annotated[bool, typer.Option("--reranking", help="Answer /v1/rerank, with a model for that.")] = False,
    slots: Annotated[bool, typer.Option("--slots", help="Answer /slots: what is being computed.")] = False,
    chat_template_file: Annotated[Path | None, typer.Option(help="A chat template, not the file's own.")] = None,
    lora: Lora = None,
    draft: Annotated[
        Path | None, typer.Option(help="A small GGUF file with the same tokens that guesses ahead; the answers stay.")
    ] = None,
    grammar: Grammar = None,
    json_schema: JsonSchema = None,
    rpc: Rpc = None,
    rpc_layers: RpcLayers = -1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Serve a file with an OpenAI-compatible HTTP interface (llama.cpp's llama-server).

    Only this machine can reach it, unless --expose is given. It runs until Ctrl-C or SIGTERM, which once it serves are
    its regular end: exit code 0.

    Examples:

      ptqtp-gguf serve model.gguf

      ptqtp-gguf serve model.gguf --port 9000 --ctx 8192 --parallel 4

      ptqtp-gguf serve model.gguf --host 0.0.0.0 --expose --api-key-file keys.txt

      ptqtp-gguf serve model.gguf --embeddings --pooling last

      ptqtp-gguf serve model.gguf --lora pirate.gguf:0.5 --draft small.gguf --chat-template-file mine.jinja

      ptqtp-gguf serve model.gguf -- --cache-type-k q8_0 --metrics
    """
    if options and not options[0].startswith("-"):
        raise typer.BadParameter(f"unexpected {options[0]!r}; one file is served, llama-server's options go behind --")
    server = Server(
        file,
        host=host,
        port=port,
        ctx=ctx,
        threads=threads,
        parallel=parallel,
        expose=expose,
        api_key_file=api_key_file,
        alias=alias,
        log=log,
        rpc=rpc or (),
        rpc_layers=rpc_layers,
        embeddings=embeddings,
        pooling=pooling,
        reranking=reranking,
        lora=[adapter(text) for text in lora or ()],
        draft=draft,
        chat_template_file=chat_template_file,
        slots=slots,
        grammar=grammar,
        json_schema=json_schema,
        options=options or (),
    )
    if not is_loopback(host) and not server.has_key:
        err_console.print(
            f"Warning: whoever reaches {host} can use the model; give --api-key-file, or set LLAMA_API_KEY",
            soft_wrap=True,
            markup=False,
            style="yellow",
        )
    try:
        with reporter(quiet, as_json) as progress:
            server.start(progress)
        try:  # whoever has read that it serves may end it
            if as_json:
                where = {"url": server.url, "host": host, "port": server.port}
                event("ready", **where, model=server.name, ctx=server.ctx, pid=server.pid)
            elif not quiet:
                _announce(server)
            server.wait()
        except KeyboardInterrupt:
            pass
    finally:
        server.stop()
    if server.log_fault:
        err_console.print(f"Warning: {server.log_fault}", soft_wrap=True, markup=False, style="yellow")
    if as_json:
        event("done")
    elif not quiet:
        line("stopped")


def _announce(server: Server) -> None:
    key = ' -H "Authorization: Bearer $KEY"' if server.has_key else ""
    line(f"{server.name} at {server.url}/v1, {server.ctx} tokens of context; Ctrl-C ends it")
    path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    if server.embeddings:
        path, body = "embeddings", '{"input": ["Hello", "Goodbye"]}'
    elif server.reranking:
        path, body = "rerank", '{"query": "Hello", "documents": ["Good day", "Goodbye"]}'
    line(f"  curl {server.url}/v1/{path}{key} -d '{body}'")
    key = 'os.environ["KEY"]' if server.has_key else '"none"'
    line(f'  openai.OpenAI(base_url="{server.url}/v1", api_key={key})')
