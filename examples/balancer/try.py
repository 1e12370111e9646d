"""Kill one of two servers under load, behind a balancer, and count what clients see.

python examples/balancer/try.py [--litellm PROGRAM]. Needs nginx, or LiteLLM's proxy. All addresses are 127.0.0.1.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLIENTS, REQUESTS = 8, 12  # each client sends so many, every other one as a stream
TOKENS = 300
KEY = "sk-of-this-experiment"  # that LiteLLM wants
LITELLM = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # no prices from the network
START_SECONDS = 120
ANSWER_SECONDS = 120


def main() -> int:
    """Run the experiment; return 0 if no request was lost that had not begun to answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--litellm", metavar="PROGRAM", help="try LiteLLM's proxy, by its program, in place of nginx")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="how many each client sends")
    options = parser.parse_args()
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llamita-")))
        commands = [[sys.executable, "-m", "llamita", "serve", "embedded", "--port", str(port)] for port in ports[1:]]
        servers = [stack.enter_context(running(c, folder / f"server{i}.log")) for i, c in enumerate(commands)]
        for port in ports[1:]:
            wait_for(port, "/ready")
        if options.litellm:
            text = with_ports((HERE / "litellm.yaml").read_text(), ports)
            (folder / "litellm.yaml").write_text(text)
            command = [options.litellm, "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1"]
            stack.enter_context(running([*command, "--port", str(ports[0])], folder / "balancer.log"))
            wait_for(ports[0], "/health/liveliness")
        else:
            (folder / "nginx.conf").write_text(with_ports((HERE / "nginx.conf").read_text(), ports))
            command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off;"]
            stack.enter_context(running(command, folder / "balancer.log"))
            wait_for(ports[0], "/ready")
        return report(experiment(ports[0], servers[0], ports[1], options.requests))


def with_ports(text: str, ports: list[int]) -> str:
    """Return a configuration with free ports in place of its own."""
    for number, port in zip((8080, 8081, 8082), ports, strict=True):
        text = text.replace(f"127.0.0.1:{number}", f"127.0.0.1:{port}")
    return text


def experiment(port: int, victim: subprocess.Popen[bytes], victim_port: int, requests: int) -> Counter[str]:
    """Send requests from several clients; kill a server when a third of them is answered."""
    counts: Counter[str] = Counter()
    expected, _ = ask(port, False)
    done = threading.Semaphore(0)

    def client(number: int) -> None:
        for i in range(requests):
            is_stream = (number + i) % 2 == 0
            try:
                text, is_whole = ask(port, is_stream)
            except (OSError, HTTPException, ValueError) as error:
                text, is_whole = "", False
                counts[f"  {type(error).__name__}: {str(error)[:90]}"] += 1
            kind = "stream" if is_stream else "answer"
            if is_whole:
                counts[f"{kind} whole" if text == expected else f"{kind} wrong"] += 1
            else:
                counts[f"{kind} broken off" if text else f"{kind} lost"] += 1
            done.release()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for _ in range(CLIENTS * requests // 3):
        done.acquire()
    counts["answers that the killed server was at work on"] = work(victim_port)
    victim.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    return counts


def work(port: int) -> int:
    """Return how many answers a server is at work on."""
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    connection.request("GET", "/v1/load")
    (load,) = json.loads(connection.getresponse().read())["models"]
    connection.close()
    return len(load["running"]) + load["waiting"]


def ask(port: int, is_stream: bool) -> tuple[str, bool]:
    """Return an answer's text, and whether it came to its end. Text without an end is of a stream that broke off.

    Raises:
        OSError, HTTPException, ValueError: nothing came that is an answer.
    """
    body = {
        "model": "embedded", "messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": TOKENS,
        "temperature": 0, "ignore_eos": True, "stream": is_stream,
    }  # fmt: skip
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status} {response.read(200)!r}")
        if not is_stream:
            return json.loads(response.read())["choices"][0]["message"]["content"], True
        return read_stream(response)
    finally:
        connection.close()


def read_stream(response: Any) -> tuple[str, bool]:
    """Return the text of a stream, at least a space once it has begun, and whether it ended as it should."""
    text = ""
    try:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                return text, True
            if data.startswith("{"):
                piece = json.loads(data)
                if "error" in piece:
                    break
                text += "".join(choice["delta"].get("content") or "" for choice in piece["choices"])
    except (OSError, HTTPException):
        pass
    return text or " ", False


def report(counts: Counter[str]) -> int:
    """Print the counts; return the exit code."""
    for what, count in sorted(counts.items()):
        print(f"{count:5}  {what}")
    lost = sum(count for what, count in counts.items() if what.endswith(("lost", "wrong")))
    print("no request was lost that had not begun to answer" if not lost else f"{lost} requests were lost")
    return int(lost > 0)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the block lasts; show its output if the block fails."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=log.parent, stdout=file, stderr=file, env={**os.environ, **LITELLM})
    try:
        yield process
    except BaseException:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(port: int, path: str) -> None:
    """Wait until a server answers 200; raise RuntimeError if it does not."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except (OSError, HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise RuntimeError(f"nothing answers at port {port}")


if __name__ == "__main__":
    sys.exit(main())
