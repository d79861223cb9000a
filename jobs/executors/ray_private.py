"""All that is used of Ray beyond its documented interface, each checked with the version below: look again at another.

Tokens as Ray reads them, the head of this machine, the head's own RPC, pickling modules by value, session folders.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

CHECKED_WITH = "2.60.0"

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # "(raylet) Task ... failed" comes through even with log_to_driver=False
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # they would not be in the empty folder of ray_cluster.py, and never used
}
"""What is set in the environment before Ray is imported, unless the user has set it."""

_ASK_SECONDS = 10.0


def local_head() -> str | None:
    """HOST:PORT of the cluster that runs on this machine, as `auto` means it."""
    from ray._private.services import canonicalize_bootstrap_address

    found: str | None = canonicalize_bootstrap_address("auto")
    return found or None


def own_token() -> dict[str, str]:
    """The token that this process has for clusters, as Ray would send it; empty if there is none."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined] # compiled, so mypy cannot see it

    read_tokens_again()
    if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
        return {}
    if not AuthenticationTokenLoader.instance().has_token():
        return {}
    headers: dict[str, str] = AuthenticationTokenLoader.instance().get_token_for_http_header()
    return headers


def read_tokens_again() -> None:
    """Afterwards Ray knows the token that the environment names now."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] # compiled, so mypy cannot see it

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def refuses(endpoint: str, headers: dict[str, str]) -> bool:
    """Whether the head sends away a caller with these headers. Raises OSError if what answers is no Ray head."""
    import grpc

    with _channel(endpoint) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=_ASK_SECONDS, metadata=tuple((name.lower(), value) for name, value in headers.items()))
        except grpc.RpcError as error:
            code = error.code()
            if code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
                return True
            raise OSError(f"it does not answer as a Ray head does ({code.name.lower()}: {error.details()})") from error
    return False


def pickle_by_value(*modules: ModuleType) -> None:
    """Afterwards what this process sends to workers brings these modules along."""
    import ray.cloudpickle

    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)


def session_folder(folder: Path) -> dict[str, str]:
    """The argument of `ray.init` that keeps all of a session in a folder. Ray opens it to everyone."""
    return {"_temp_dir": str(folder)}


def _channel(endpoint: str) -> Any:
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() not in {"1", "true"}:
        return grpc.insecure_channel(endpoint)
    key, certificate, authority = (
        Path(os.environ[f"RAY_TLS_{name}"]).read_bytes() for name in ("SERVER_KEY", "SERVER_CERT", "CA_CERT")
    )
    return grpc.secure_channel(endpoint, grpc.ssl_channel_credentials(authority, key, certificate))
