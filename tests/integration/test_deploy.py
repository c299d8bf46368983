"""What `deploy/` holds is accepted by the programs it is for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sharpwatch._version import __version__
from sharpwatch.common.shards import Shard, parse_shard
from sharpwatch.daemon.api.foreign_alerts import MAX_ALERTS
from sharpwatch.daemon.config.load import load_config
from sharpwatch.daemon.config.settings import DaemonConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULES = PROMETHEUS / "rules/sharpwatch.rules.yml"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes/pod.yaml").read_text()))
KINDS = {manifest["kind"]: manifest for manifest in MANIFESTS}
SHARDS = {
    manifest["kind"]: manifest for manifest in yaml.safe_load_all((DEPLOY / "kubernetes/shards.yaml").read_text())
}
UNIT = (DEPLOY / "systemd/sharpwatch.service").read_text()
CONTAINERFILE = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")


def succeed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sidecar() -> dict:
    (container,) = KINDS["Pod"]["spec"]["initContainers"]
    return container


# Prometheus


def test_prometheus_takes_the_configuration_and_its_rules(program):
    succeed(program("promtool"), "check", "config", str(PROMETHEUS / "prometheus.yml"))


def test_alertmanager_takes_the_receiver_and_it_fits_the_daemon(program):
    path = PROMETHEUS / "alertmanager.yml"
    succeed(program("amtool"), "check-config", str(path))
    (receiver,) = (one for one in yaml.safe_load(path.read_text())["receivers"] if one["name"] == "sharpwatch")
    (webhook,) = receiver["webhook_configs"]
    assert webhook["url"] == f"http://{DaemonConfig().http}/api/v1/alerts"
    assert webhook["send_resolved"]
    assert 0 < webhook["max_alerts"] <= MAX_ALERTS


def test_rules_pass_their_own_tests(program):
    succeed(program("promtool"), "check", "rules", str(RULES))
    succeed(program("promtool"), "test", "rules", str(RULES.with_name("sharpwatch.test.yml")))


def test_every_rule_says_what_to_do():
    document = (ROOT / "docs/metrics.md").read_text()
    anchors = {line[3:].strip().lower() for line in document.splitlines() if line.startswith("## ")}
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    assert len(rules) == 6
    for rule in rules:
        assert rule["labels"]["severity"]
        assert rule["annotations"].keys() >= {"summary", "description", "runbook"}
        path, anchor = rule["annotations"]["runbook"].split("#")
        assert path == "docs/metrics.md"
        assert anchor == rule["alert"].lower()
        assert anchor in anchors


def test_kubernetes_discovery_keeps_the_daemon_and_nothing_else(program, tmp_path):
    # Debian's Prometheus is built without Kubernetes discovery: the labels come from a static list, the relabelling is
    # the file's own.
    config = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    assert config.pop("rule_files") == ["rules/sharpwatch.rules.yml"]
    daemon = {"container_port_name": sidecar()["ports"][0]["name"], "phase": "Running", "name": "trainer"}
    pods = {
        "10.0.0.1:9741": daemon,
        "10.0.0.1:8080": daemon | {"container_port_name": "http"},
        "10.0.0.2:9741": daemon | {"phase": "Succeeded"},
        "10.0.0.3": {"phase": "Running", "name": "no-port"},
    }
    job["static_configs"] = [
        {
            "targets": [address],
            "labels": {f"__meta_kubernetes_pod_{name}": value for name, value in pod.items()}
            | {"__meta_kubernetes_namespace": "ml", "__meta_kubernetes_pod_node_name": "gpu-7"},
        }
        for address, pod in pods.items()
    ]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    found = json.loads(
        succeed(program("promtool"), "check", "service-discovery", "--timeout=1s", str(path), job["job_name"])
    )
    kept = [target["labels"] for target in found if target["labels"]]
    assert [labels["__address__"] for labels in kept] == ["10.0.0.1:9741"]
    assert kept[0].items() >= {"namespace": "ml", "pod": "trainer", "node": "gpu-7", "job": "sharpwatch"}.items()


# The daemon's configurations


def configurations() -> dict[str, str]:
    return {
        "systemd": (DEPLOY / "systemd/sharpwatch.yaml").read_text(),
        "container": (DEPLOY / "container.yaml").read_text(),
        "kubernetes": KINDS["ConfigMap"]["data"]["sharpwatch.yaml"],
    }


@pytest.mark.parametrize("name", ["systemd", "container", "kubernetes"])
def test_daemon_takes_the_configuration(name, tmp_path):
    path = tmp_path / "sharpwatch.yaml"
    path.write_text(configurations()[name])
    config = load_config(path)
    assert config.daemon.grpc == "127.0.0.1:7741"
    assert config.daemon.http.endswith(":9741")
    assert config.daemon.store == "sqlite:////var/lib/sharpwatch/sharpwatch.db"
    # What is deployed from an example acts on nobody's run.
    assert [policy.mode for policy in config.policies] == ["observe"]
    # A silent run has to be exported for longer than its alert takes to fire: 300 s and 1 m.
    assert config.daemon.stale_after > 360


def test_command_line_takes_the_configuration():
    succeed(sys.executable, "-m", "sharpwatch", "check-config", str(DEPLOY / "systemd/sharpwatch.yaml"))


# systemd


def test_systemd_takes_the_unit(program, tmp_path):
    # The unit names where an installation is; here it is elsewhere.
    path = tmp_path / "sharpwatch.service"
    installed = "/opt/sharpwatch/bin/sharpwatch"
    assert f"ExecStart={installed} serve --config /etc/sharpwatch/sharpwatch.yaml\n" in UNIT
    path.write_text(UNIT.replace(installed, str(Path(sys.executable).with_name("sharpwatch"))))
    analyze = program("systemd-analyze")
    done = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    # Exposure from 0 to 10; systemd calls up to 2 ok. What is left is the network, which a server needs.
    succeed(analyze, "security", "--offline=true", "--threshold=20", str(path))


def test_unit_may_write_its_journal():
    settings = dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line and not line.startswith("#"))
    assert settings["DynamicUser"] == "yes"
    assert f"/var/lib/{settings['StateDirectory']}/" in configurations()["systemd"]


# Containers


def test_image_copies_what_there_is_and_runs_as_nobody():
    for sources in re.findall(r"^COPY (?!--from)(.+)$", CONTAINERFILE, re.MULTILINE):
        *paths, _ = sources.split()
        assert all((ROOT / path).exists() for path in paths), sources
    assert re.findall(r"^USER (\S+)$", CONTAINERFILE, re.MULTILINE)[-1] == "10001:10001"
    # Exec form: signals reach the daemon, not a shell.
    assert json.loads(re.findall(r"^ENTRYPOINT (.+)$", CONTAINERFILE, re.MULTILINE)[0]) == ["sharpwatch"]
    assert json.loads(re.findall(r"^CMD (.+)$", CONTAINERFILE, re.MULTILINE)[0])[0] == "serve"
    assert re.findall(r"^EXPOSE (.+)$", CONTAINERFILE, re.MULTILINE) == ["9741"]


def test_sidecar_is_native_and_no_run_waits_for_it():
    container = sidecar()
    assert container["restartPolicy"] == "Always"
    assert "startupProbe" not in container
    assert container["image"].endswith(f":{__version__}")
    paths = {name: container[name]["httpGet"]["path"] for name in ("livenessProbe", "readinessProbe")}
    assert paths == {"livenessProbe": "/-/healthy", "readinessProbe": "/-/ready"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {container[probe]["httpGet"]["port"] for probe in paths} <= ports.keys()
    assert all(len(name) <= 15 for name in ports)  # Kubernetes' limit of a port's name
    assert KINDS["Pod"]["metadata"]["annotations"]["prometheus.io/port"] == str(ports["sharpwatch-http"])


def test_sidecar_can_do_no_more_than_it_must():
    container, pod = sidecar(), KINDS["Pod"]["spec"]
    security = container["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] == 10001
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]
    assert container["resources"].keys() == {"requests", "limits"}
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_each_pod_of_the_shards_has_one_and_is_reached_by_its_own_name(tmp_path):
    config, service, placed = SHARDS["ConfigMap"], SHARDS["Service"], SHARDS["StatefulSet"]["spec"]
    pod = placed["template"]
    (container,) = pod["spec"]["containers"]
    path = tmp_path / "sharpwatch.yaml"
    path.write_text(config["data"]["sharpwatch.yaml"])
    daemon = load_config(path).daemon
    shell, flag, script = container["command"]
    assert (shell, flag) == ("sh", "-c")
    # What the shell makes of it in the second pod.
    arguments = subprocess.run(
        ["sh", "-c", script.replace("exec sharpwatch", "printf '%s\n'")],
        env={"HOSTNAME": "sharpwatch-1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert given["--config"] == "/etc/sharpwatch/sharpwatch.yaml"
    assert parse_shard(given["--shard"]) == Shard(1, placed["replicas"])
    assert given["--advertise"] == f"sharpwatch-1.{service['metadata']['name']}:7741"
    assert placed["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    selected = service["spec"]["selector"]
    assert selected == placed["selector"]["matchLabels"] == pod["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert (daemon.grpc, daemon.http) == tuple(f"0.0.0.0:{port}" for port in ports.values())
    assert daemon.store.startswith("postgresql+psycopg://")
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"]
    assert daemon.credentials.startswith(mounts["credentials"])
    assert daemon.tls is not None
    assert daemon.tls.key.startswith(mounts["tls"])
    assert daemon.token_file == container["env"][0]["value"] == f"{mounts['run']}/operator.token"
    assert "postgresql" in CONTAINERFILE  # the extra
    assert container["image"].endswith(f":{__version__}")


def test_every_volume_of_the_pod_is_there():
    pod = KINDS["Pod"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in sidecar()["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["config"]["configMap"]["name"] == KINDS["ConfigMap"]["metadata"]["name"]
    claim = KINDS["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["journal"]["persistentVolumeClaim"]["claimName"] == claim
    settings = yaml.safe_load(configurations()["kubernetes"])["daemon"]
    assert settings["store"].startswith(f"sqlite:///{mounts['journal']}/")
    # fsGroup opens what it finds on a volume that lasts to the group: the token has to be on one that doesn't.
    assert settings["token_file"] == sidecar()["env"][0]["value"] == f"{mounts['run']}/operator.token"
    assert "emptyDir" in volumes["run"]
    assert mounts["config"] in CONTAINERFILE  # where CMD looks
