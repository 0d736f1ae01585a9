"""Serves a GGUF file with llama.cpp until it is ended: python llama_server.py FILE PORT."""

from __future__ import annotations

import sys
import threading

import xllamacpp


def main(path: str, port: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {"smollm2"}
    params.n_ctx = 8192
    params.n_parallel = 2
    params.cpuparams.n_threads = 1  # more would wait by spinning, on a machine that does other work
    params.port = port
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}/v1", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
