"""What serves a file to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..serve import Server, is_loopback
from ..terminal import err_console, event, line
from .common import AsJson, Quiet, Rpc, RpcLayers, reporter


def serve(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
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
    """
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
        if as_json:
            event(
                "ready", url=server.url, host=host, port=server.port, model=server.name, ctx=server.ctx, pid=server.pid
            )
        elif not quiet:
            _announce(server)
        try:
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
    line(
        f"  curl {server.url}/v1/chat/completions{key} "
        """-d '{"messages": [{"role": "user", "content": "Hello"}]}'"""
    )
    key = 'os.environ["KEY"]' if server.has_key else '"none"'
    line(f'  openai.OpenAI(base_url="{server.url}/v1", api_key={key})')
