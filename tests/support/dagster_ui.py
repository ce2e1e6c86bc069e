"""Talking to a running Dagster UI."""

import json
import urllib.request
from typing import Any


def answers(address: str) -> bool:
    try:
        return bool(graphql(address, "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"))
    except OSError:
        return False


def graphql(address: str, query: str) -> Any:
    request = urllib.request.Request(
        f"{address}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["data"]
