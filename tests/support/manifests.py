"""Checks whether Kubernetes would accept a Job and run it as intended."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import kubernetes_validate

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti|)")
_UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}
_PLAIN = {"cpu", "memory"}
"""Resources of which a pod may request less than its limit; others are counted in whole units."""


def problems(job: dict[str, Any]) -> list[str]:
    """Return what is wrong with a Job, by the schema of Kubernetes and by rules that the schema lacks."""
    try:
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"schema: {error.message}"]
    return list(_problems(job))


def _problems(job: dict[str, Any]) -> Iterator[str]:
    spec, template = job["spec"], job["spec"]["template"]
    pod = template["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield f"restartPolicy {pod.get('restartPolicy')}: a Job takes Never or OnFailure"
    for name, seconds in (
        ("activeDeadlineSeconds", spec.get("activeDeadlineSeconds", 1)),
        ("terminationGracePeriodSeconds", pod.get("terminationGracePeriodSeconds", 1)),
    ):
        if seconds <= 0:
            yield f"{name} {seconds}: not above 0"
    volumes = pod.get("volumes") or []
    names = [volume["name"] for volume in volumes]
    for volume in volumes:
        yield from _volume(volume)
    mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts") or []}
    yield from (f"volume {name} is there twice" for name, count in Counter(names).items() if count > 1)
    yield from (f"no volume is called {name}, which is mounted" for name in sorted(mounted - set(names)))
    yield from (f"volume {name} is not mounted" for name in sorted(set(names) - mounted))
    for container in pod["containers"]:
        yield from _container(container)
    labelled = [job["metadata"]["name"], template["metadata"]["name"], *names, *(c["name"] for c in pod["containers"])]
    yield from (f"name {name!r} is no DNS label" for name in labelled if not _LABEL.fullmatch(name))
    for secret in pod.get("imagePullSecrets") or []:
        yield from _object_name(secret["name"])
    for metadata in (job["metadata"], template["metadata"]):
        for key, value in metadata.get("labels", {}).items():
            if not _LABEL_VALUE.fullmatch(value):
                yield f"label {key}: {value!r} is no value of a label"
    for toleration in pod.get("tolerations") or []:
        yield from _toleration(toleration)


def _volume(volume: Mapping[str, Any]) -> Iterator[str]:
    for kind, key in (("configMap", "name"), ("secret", "secretName"), ("persistentVolumeClaim", "claimName")):
        if kind in volume:
            yield from _object_name(volume[kind][key])
    if "emptyDir" in volume:
        if volume["emptyDir"].get("medium", "") not in ("", "Memory"):
            yield f"medium {volume['emptyDir']['medium']} of volume {volume['name']}: there is only Memory"
        if "sizeLimit" in volume["emptyDir"]:
            yield from _quantity(f"volume {volume['name']}", volume["emptyDir"]["sizeLimit"])


def _container(container: Mapping[str, Any]) -> Iterator[str]:
    if not container.get("image"):
        yield "no image"
    paths = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
    yield from (f"{path} is mounted twice" for path, count in Counter(paths).items() if count > 1)
    yield from (f"{path} is no absolute path" for path in paths if not path.startswith("/"))
    names = [variable["name"] for variable in container.get("env") or []]
    yield from (f"variable {name} is set twice" for name, count in Counter(names).items() if count > 1)
    yield from (f"{name!r} is no name of a variable" for name in names if not _VARIABLE.fullmatch(name))
    for source in container.get("envFrom") or []:
        yield from _object_name((source.get("secretRef") or source["configMapRef"])["name"])
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name, quantity in [*requests.items(), *limits.items()]:
        yield from _quantity(name, quantity)
        if name not in _PLAIN and not quantity.isdecimal():
            yield f"{name} {quantity}: only whole ones can be had"
    for name in requests.keys() & limits.keys():
        if (_size(requests[name]) or 0) > (_size(limits[name]) or 0):
            yield f"{name}: asks for {requests[name]}, above its limit of {limits[name]}"
    yield from (f"{name} needs a limit" for name in requests.keys() - limits.keys() - _PLAIN)


def _toleration(toleration: Mapping[str, Any]) -> Iterator[str]:
    if toleration.get("operator", "Equal") not in ("Equal", "Exists"):
        yield f"operator {toleration['operator']} of a toleration: Equal or Exists"
    if toleration.get("operator") == "Exists" and "value" in toleration:
        yield "a toleration with operator Exists has no value"
    if toleration.get("effect", "NoSchedule") not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
        yield f"effect {toleration['effect']} of a toleration is none"


def _object_name(name: str) -> Iterator[str]:
    if not _OBJECT.fullmatch(name):
        yield f"{name!r} is no name of an object"


def _quantity(name: str, quantity: str) -> Iterator[str]:
    if not _size(quantity):
        yield f"{name}: {quantity!r} is no quantity above 0"


def _size(quantity: str) -> float | None:
    found = _QUANTITY.fullmatch(quantity)
    return float(found[1]) * _UNITS[found[2]] if found else None
