"""A long run: `python -m oracle --seconds 600`. Exits with 1 when an answer was wrong, lost or doubled, or memory grew."""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from oracle.memory import Growth
from oracle.soak import Load, gauges, soak
from oracle.subjects import Subject, subjects

_READY = re.compile(r"gRPC \S+:(\d+) .*metrics (http://\S+)")


def main() -> int:
    """Serve the oracle's models, load the server, print what happened and what was wrong."""
    parser = argparse.ArgumentParser(prog="oracle", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long callers ask")
    parser.add_argument("--callers", type=int, default=16, help="callers at once")
    parser.add_argument("--kills", type=int, default=50, help="clients killed with requests under way, at most")
    parser.add_argument("--reloads", type=int, default=10_000, help="models reloaded, at most")
    parser.add_argument("--growth", type=float, default=50, help="MB the server may grow in the second half")
    parser.add_argument("--front-end", default="direct", help="what the server speaks with: direct, grpcio or envoy")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        known = subjects(repository)
        ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
        command = [sys.executable, "-m", "layercast.server", "serve", "--repository", str(repository), *ports]
        command += ["--model-control", "explicit", "--front-end", args.front_end]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                return _load(server, known, repository, args)
            finally:
                server.terminate()


def _load(
    server: "subprocess.Popen[str]", known: dict[str, Subject], repository: Path, args: argparse.Namespace
) -> int:
    assert server.stdout
    ready = next((found for line in server.stdout if (found := _READY.search(line))), None)
    if ready is None:
        return 1
    threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop the server
    with Growth(ready[2]) as growth:
        load = Load(args.callers, 10**9, args.seconds, args.kills, args.reloads)
        journal = soak(f"127.0.0.1:{ready[1]}", known, load, repository)
    for ends, count in sorted(journal.counts().items()):
        print(f"{count:>9,}  {ends}")
    faults = journal.wrong()
    if growth.second_half_mb > args.growth:
        faults.append(f"memory grew by {growth.second_half_mb:.1f} MB in the second half, at most {args.growth:g} may")
    left = gauges(ready[2], "layercast_queue_rows", "layercast_inflight_requests")
    print(f"memory in the second half: {growth.second_half_mb:+.1f} MB; left in the server: {left}")
    for fault in faults[:50]:
        print("WRONG", fault)
    print(f"{len(journal.asked):,} requests, {len(faults)} wrong")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
