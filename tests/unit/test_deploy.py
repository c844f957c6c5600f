"""The files in `deploy/`: read by parsers, dry-run where a tool is there, and consistent with the code."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import services
import yaml
from deploy_files import (
    DEPLOY,
    DETENT,
    GOOD_ENDS,
    NEEDS_A_PERSON,
    PUBLIC_PATHS,
    UNITS,
    compose_file,
    container,
    objects,
    pod,
)

from serving.http import auth

# --- systemd ----------------------------------------------------------------------------------------------

_SANDBOX = (
    "StateDirectory StateDirectoryMode UMask ReadWritePaths ProtectSystem ProtectHome PrivateTmp PrivateDevices "
    "PrivateUsers ProtectClock ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules "
    "ProtectKernelTunables ProtectProc NoNewPrivileges CapabilityBoundingSet LockPersonality RestrictAddressFamilies "
    "RestrictNamespaces RestrictRealtime RestrictSUIDSGID RemoveIPC SystemCallArchitectures SystemCallFilter "
    "SystemCallErrorNumber"
)
_SERVICE = (
    "Type User Group EnvironmentFile Environment ExecStart TimeoutStartSec TimeoutStopSec Restart RestartSec "
    "RestartPreventExitStatus SuccessExitStatus IPAddressDeny IPAddressAllow MemoryMax TasksMax LimitNOFILE "
    "OOMScoreAdjust CPUWeight CPUSchedulingPolicy IOSchedulingClass Nice"
)
KNOWN_KEYS = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec", "StartLimitBurst"},
    "Service": set(f"{_SERVICE} {_SANDBOX}".split()),
    "Timer": {"OnCalendar", "RandomizedDelaySec", "Persistent"},
    "Install": {"WantedBy"},
}


def unit(text: str) -> dict[str, dict[str, str]]:
    """A unit file; every key once, but `Environment`. Raises: AssertionError for a section or key that is not known."""
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    for section in parser.sections():
        unknown = set(parser[section]) - KNOWN_KEYS.get(section, set())
        assert section in KNOWN_KEYS, section
        assert not unknown, f"[{section}]: {sorted(unknown)}"
    return {section: dict(parser[section]) for section in parser.sections()}


def read_unit(name: str) -> dict[str, dict[str, str]]:
    return unit((DEPLOY / "systemd" / name).read_text())


def test_units_are_these():
    names = [path.name for path in UNITS]
    assert names == ["detent-retrain.service", "detent-retrain.timer", "detent-serve.service"]


@pytest.mark.parametrize("wrong", ["[Service]\nNoNewPriviliges=true", "[Servce]\nType=exec"])
def test_misspelt_unit_is_seen(wrong):
    with pytest.raises(AssertionError):
        unit(wrong)


@pytest.mark.parametrize("name", ["detent-serve.service", "detent-retrain.service"])
def test_units_run_as_nobody_in_particular_in_a_sandbox(name):
    service = read_unit(name)["Service"]
    assert (service["User"], service["Group"]) == ("detent", "detent")
    assert service["EnvironmentFile"] == "/etc/detent/detent.env"
    assert service["ReadWritePaths"] == "/var/lib/detent"
    assert service["StateDirectory"] == "detent"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    for key in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "RestrictNamespaces"):
        assert service[key] == "true"
    assert re.fullmatch(r"\dG", service["MemoryMax"])
    assert service["ExecStart"].startswith(f"{DETENT} ")


def test_service_comes_back_and_the_job_ends_well_where_it_should():
    serve, retrain = read_unit("detent-serve.service")["Service"], read_unit("detent-retrain.service")["Service"]
    assert serve["Restart"] == "always"
    assert set(map(int, serve["RestartPreventExitStatus"].split())) <= NEEDS_A_PERSON
    assert "--host 127.0.0.1" in serve["ExecStart"]
    assert retrain["Type"] == "oneshot"
    assert set(map(int, retrain["SuccessExitStatus"].split())) == GOOD_ENDS
    assert set(map(int, retrain["RestartPreventExitStatus"].split())) == NEEDS_A_PERSON
    assert (retrain["CPUSchedulingPolicy"], retrain["IOSchedulingClass"]) == ("idle", "idle")
    assert int(retrain["OOMScoreAdjust"]) > 0 > int(serve["OOMScoreAdjust"])
    assert read_unit("detent-retrain.timer")["Timer"]["Persistent"] == "true"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_itself_accepts_the_units(tmp_path):
    # Verification looks whether the programme is there.
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text().replace(DETENT, shutil.which("true") or ""))
    files = [str(tmp_path / path.name) for path in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    for name in ("detent-serve.service", "detent-retrain.service"):
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(tmp_path / name)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-300:] + done.stderr


# --- containers -------------------------------------------------------------------------------------------


def images() -> list[str]:
    text = (DEPLOY / "Containerfile").read_text()
    found = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    found += [container(objects()[kind])["image"] for kind in ("Deployment", "CronJob")]
    return [*found, *(service["image"] for service in compose_file()["services"].values())]


@pytest.mark.parametrize("image", sorted(set(images())))
def test_images_name_no_registry_and_a_version(image):
    name, _, tag = image.partition(":")
    assert tag
    assert "." not in name.partition("/")[0]
    assert ":" not in tag


def test_containerfile_builds_in_one_stage_and_runs_as_nobody_in_another():
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions} <= known
    last = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    assert last > 0
    final = dict(instructions[last:])
    assert "COPY" not in final
    assert final["USER"] == "10001:10001"
    assert json.loads(final["ENTRYPOINT"]) == ["detent"]
    assert final["VOLUME"] == "/var/lib/detent"
    (installed,) = re.findall(r"pip install (.*?) &&", final["RUN"])
    assert installed.split() == ["--no-cache-dir", "/wheels/*.whl"]


@pytest.mark.parametrize("kind", ["Deployment", "CronJob"])
def test_pods_have_no_rights(kind):
    spec, main = pod(objects()[kind]), container(objects()[kind])
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    assert mounts == {"state": "/var/lib/detent", "tmp": "/tmp"}  # noqa: S108
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert (
        volumes["state"]["persistentVolumeClaim"]["claimName"] == objects()["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert "memory" in main["resources"]["limits"]


def test_deployment_has_one_writer_and_probes_that_need_no_token():
    deployment, main = objects()["Deployment"], container(objects()["Deployment"])
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == objects()["Service"]["spec"]["selector"]
    paths = {name: main[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths["liveness"] == "/v2/health/live"
    assert paths["startup"] == paths["readiness"] == "/v2/health/ready"
    assert set(paths.values()) <= PUBLIC_PATHS
    (port,) = main["ports"]
    assert f"--port={port['containerPort']}" in main["args"]
    assert {main[f"{name}Probe"]["httpGet"]["port"] for name in paths} == {port["name"]}
    assert {entry["name"] for entry in main["env"]} == {auth.READ_TOKEN, auth.DECIDE_TOKEN, auth.OPERATOR_TOKEN}
    assert all(set(entry["valueFrom"]) == {"secretKeyRef"} for entry in main["env"])


def test_job_is_alone_beside_the_service_and_ends_well_where_it_should():
    spec, main = objects()["CronJob"]["spec"], container(objects()["CronJob"])
    assert spec["concurrencyPolicy"] == "Forbid"
    (term,) = pod(objects()["CronJob"])["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = objects()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"] == labels
    (rule,) = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) == NEEDS_A_PERSON
    assert rule["onExitCodes"]["containerName"] == main["name"]
    assert main["command"] == ["/bin/sh", "-c"]


@pytest.mark.parametrize("code", [0, 10, 11, 65, 69, 70, 75, 78, 130])
def test_script_of_the_job_turns_good_ends_into_success(code, tmp_path):
    for name, text in (("detent", f"exit {code}"), ("chrt", 'shift 2\nexec "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    main = container(objects()["CronJob"])
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run([*main["command"], *main["args"]], env={"PATH": path}, capture_output=True, check=False)
    assert done.stderr == b""
    assert done.returncode == (0 if code in GOOD_ENDS else code)


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if entries is None or not value:
        yield where, value
        return
    for key, each in entries:
        yield from leaves(each, f"{where}.{key}")


# kubectl reads pods into its own types, drops what these do not have, and writes the rest: nothing may be missing.
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("kind", ["Deployment", "CronJob"])
@pytest.mark.parametrize("wrong", [False, True])
def test_kubectl_knows_every_field(kind, wrong, tmp_path):
    ours = objects()[kind]
    if wrong:
        container(ours)["imagePulPolicy"] = "Always"
    (tmp_path / "object.yaml").write_text(yaml.safe_dump(ours))
    done = subprocess.run(
        ["kubectl", "set", "env", "--local", "-f", str(tmp_path / "object.yaml"), "DETENT_TEST=1", "-o", "json"],
        capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = dict(leaves(json.loads(done.stdout)))
    missing = {where for where, value in leaves(ours) if read.get(where) != value}
    assert missing == ({f"{_path_of_container(kind)}.imagePulPolicy"} if wrong else set())


def _path_of_container(kind: str) -> str:
    template = ".spec.jobTemplate.spec.template" if kind == "CronJob" else ".spec.template"
    return f"{template}.spec.containers.0"


def test_claim_and_address_are_plain():
    claim, service = objects()["PersistentVolumeClaim"], objects()["Service"]
    assert (claim["apiVersion"], service["apiVersion"]) == ("v1", "v1")
    assert set(claim["spec"]) == {"accessModes", "resources"}
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert set(service["spec"]) == {"selector", "ports"}
    assert [set(port) for port in service["spec"]["ports"]] == [{"name", "port", "targetPort"}]


# --- compose ----------------------------------------------------------------------------------------------

_COMPOSE = (
    "image build user read_only tmpfs cap_drop security_opt volumes command environment ports depends_on healthcheck "
    "mem_limit cpu_shares stop_grace_period restart profiles"
)
COMPOSE_KEYS = set(_COMPOSE.split())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return compose_file()


def test_compose_keeps_to_loopback_and_reads_its_secrets(compose):
    assert set(compose) == {"name", "x-detent", "services", "volumes"}
    assert set(compose["services"]) == {"serve", "retrain", "redis", "postgres"}
    for service in compose["services"].values():
        assert set(service) <= COMPOSE_KEYS
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        named = {volume.partition(":")[0] for volume in service["volumes"]}
        assert named <= set(compose["volumes"])
        assert "no-new-privileges:true" in service["security_opt"]
        for name, value in service.get("environment", {}).items():
            if "TOKEN" in name or "PASSWORD" in name or "AUTH" in name:
                assert re.fullmatch(r"\$\{[A-Z_]+:\?.*\}", value), f"{name} is written down"
    for name in ("serve", "retrain"):
        service = compose["services"][name]
        assert (service["user"], service["read_only"], service["cap_drop"]) == ("10001:10001", True, ["ALL"])


def test_compose_waits_for_what_is_healthy(compose):
    services = compose["services"]
    assert services["serve"]["depends_on"] == {name: {"condition": "service_healthy"} for name in ("postgres", "redis")}
    for name in ("serve", "redis", "postgres"):
        assert services[name]["restart"] == "always"
        assert {"test", "interval", "timeout", "retries"} <= set(services[name]["healthcheck"])
    probe = services["serve"]["healthcheck"]["test"]
    assert probe[:3] == ["CMD", "python", "-c"]
    ast.parse(probe[3])
    (path,) = re.findall(r"http://127\.0\.0\.1:8470(/[\w/]+)", probe[3])
    assert path in PUBLIC_PATHS
    assert "--port=8470" in services["serve"]["command"]
    assert services["serve"]["ports"] == ["127.0.0.1:8470:8470"]
    assert services["retrain"]["profiles"] == ["nightly"]


def test_valkey_reads_its_password_from_standard_input(compose, tmp_path):
    server = services.find_redis()
    server.require_own("its binary is not here")
    script = compose["services"]["redis"]["command"][2].replace("$$", "$")
    socket = tmp_path / "socket"
    for words, here in {
        "exec valkey-server": f"exec {server.binary}",
        "dir /data": f"dir {tmp_path}\nport 0\nunixsocket {socket}",
    }.items():
        assert words in script
        script = script.replace(words, here)
    log = (tmp_path / "log").open("wb")
    environment = {"PATH": os.environ["PATH"], "REDISCLI_AUTH": "a-secret"}
    process = subprocess.Popen(["sh", "-c", script], env=environment, stdout=log, stderr=log)
    try:
        client = redis.Redis(unix_socket_path=str(socket), password=environment["REDISCLI_AUTH"])
        services._wait(lambda: process.poll() is not None or _answers(client), "Valkey does not answer")
        settings = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        assert client.config_get(*settings) == settings
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis(unix_socket_path=str(socket)).ping()
        # Not on the command line, where every process could read it; and it is the server that is told to stop.
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(os.fsencode(server.binary))
        assert b"a-secret" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        log.close()


def _answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False
