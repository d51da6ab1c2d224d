"""Serve a model under OpenAI's interface: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

Requests join the running batch at once. Any OpenAI client and `lm_eval --model local-chat-completions` work with it.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from s2d2_lmeval.cli.values import add_shared, nonempty, parse_options, whole
from s2d2_lmeval.errors import ConfigError

SUMMARY = "an endpoint with OpenAI's interface"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", "-m", type=nonempty, required=True, metavar="PATH", help='folder, hub id, or "toy"')
    parser.add_argument("--name", type=nonempty, help="of the model, as clients call it (default: PATH)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0: any free one (default: %(default)s)")
    parser.add_argument("--rows", default="8", metavar="N|auto", help="requests decoded at a time (default: 8)")
    parser.add_argument("--max_context", type=whole(), default=None, metavar="N", help="positions of a request")
    parser.add_argument("--queue", type=whole(), default=256, metavar="N", help="requests that may wait (default: 256)")
    parser.add_argument("--api_key", metavar="KEY", help="what clients must send (default: S2D2_API_KEY, or none)")
    add_shared(parser, "--option")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    add_shared(parser, "--revision", "--threads")


def run(args: argparse.Namespace) -> int:
    """Load, listen, serve until interrupted."""
    try:
        import uvicorn

        from s2d2_lmeval.serve.app import Endpoint
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 's2d2-lmeval[serve]'.") from None
    from s2d2_lmeval.cli.checkpoints import open_model
    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.serve.service import Service

    console = begin(args.threads)
    options: dict[str, Any] = {"max_batch": args.rows, **parse_options(args.option)}
    if args.max_context is not None:
        options["max_context"] = args.max_context
    model, _, decoding = open_model(args.model, options, device=args.device, dtype=args.dtype, revision=args.revision)
    config = model.config(decoding)  # refuses what no request could use
    key = args.api_key or os.environ.get("S2D2_API_KEY") or None
    name = args.name or args.model
    service = Service(model, args.queue)
    console.print(f"{name}: {config.decoder}, {config.layout}; {config.promise}", markup=False, soft_wrap=True)
    if args.host not in LOOPBACK and key is None:
        console.print(f"Everybody who reaches {args.host} can use it: --api_key sets a key.", style="yellow")
    console.print(f"Serving on http://{args.host}:{args.port}/v1 ; Ctrl-C ends it.", markup=False)
    endpoint = Endpoint(service, name, decoding, key)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    uvicorn.run(endpoint.app(), host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=10)
    return 0
