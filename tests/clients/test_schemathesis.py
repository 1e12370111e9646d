"""Requests that Schemathesis makes from the server's own OpenAPI document: the document is true, and nothing fails."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from clients import environment
from places import ROOT
from served import serving

import llamita
from llamita.serve.keys import Keys

PYTHON = ROOT / ".venv-schemathesis" / "bin" / "python"
KEY = "sk-fuzzing-key"
CHECKS = (  # not those that want every value beyond the document to be refused: null and unknown fields are not
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


@pytest.mark.skipif(not PYTHON.exists(), reason="Schemathesis' own environment is missing: run `make clients`")
@pytest.mark.parametrize(("examples", "least"), [(5, 500), pytest.param(800, 10_000, marks=pytest.mark.slow)])
def test_requests_from_the_document(tmp_path: Path, examples: int, least: int) -> None:
    llm = llamita.load("embedded", scheme="llama3.2", context=256, max_sequences=4)
    (tmp_path / "adapters").mkdir()
    with serving({"embedded": llm}, Keys([KEY], [KEY]), adapters=tmp_path / "adapters") as served:
        command = [PYTHON, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json", "--seed", "1"]
        command += ["--header", f"Authorization: Bearer {KEY}", "--max-examples", str(examples), "--no-shrink"]
        command += ["--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS), "--request-timeout", "60"]
        command += ["--suppress-health-check", "all", "--continue-on-failure"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30 * examples, cwd=tmp_path, env=environment(tmp_path)
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert found
        assert int(found[1]) == int(found[2]) >= least
        prompt, key = "Once upon a time", {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
        answer = json.loads(served.ask("POST", "/v1/completions", body, key)[2])
        assert answer["choices"][0]["text"] == llm.generate(prompt, max_tokens=20, greedy=True).text
        assert served.state.queue.open == 0
