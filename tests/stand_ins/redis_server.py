"""A real redis-server of a test: started, paused, killed and started again on one port."""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

PASSWORD = "p@ss/w:rd#1"
QUOTED = "p%40ss%2Fw%3Ard%231"


class RedisServer:
    def __init__(self, folder: Path, port: int, *options: str):
        if not shutil.which("redis-server"):
            pytest.skip("redis-server is not installed: apt install redis-server")
        self.folder, self.port, self.options, self.process = folder, port, options, None

    @property
    def url(self) -> str:
        return f"redis://:{QUOTED}@127.0.0.1:{self.port}/0"

    def start(self) -> "RedisServer":
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", "--requirepass", PASSWORD, *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(1000):
            assert self.process.poll() is None, f"redis-server ended: {command}"
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
        raise AssertionError("redis-server does not listen")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def n_keys(self) -> int:
        import redis

        with redis.Redis(port=self.port, password=PASSWORD) as client:
            return client.dbsize()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
