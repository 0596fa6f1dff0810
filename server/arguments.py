"""Command lines of the server's programs, and the groups of flags in `--help`."""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic_settings import BaseSettings, CliSettingsSource

from lori.flags import Headings, help_formatter, refusing_flags
from server.migration.flags import FLAGS
from server.settings import Settings

GROUPS: Mapping[str, Sequence[str]] = {
    "the ten that matter first": (
        "model",
        "adapters",
        "host",
        "port",
        "keys",
        "device",
        "dtype",
        "threads",
        "resident_gib",
        "kv_cache_gib",
    ),
    "replicas": (
        "replicas",
        "max_replicas",
        "target_requests",
        "upscale_delay_s",
        "downscale_delay_s",
        "replica_cpus",
        "replica_gpus",
        "ingresses",
        "affinity_share",
        "affinity_floor",
        "ray_address",
    ),
    "adapters": (
        "demo_adapters",
        "strict",
        "hub",
        "max_rank",
        "max_resident",
        "loaded_gib",
        "max_upload_bytes",
        "adapter_cache",
        "adapter_cache_gib",
        "adapter_timeout_s",
        "delete_grace_s",
        "merges",
        "background",
        "default_merge",
        "auto_max_adapters",
        "auto_threshold",
    ),
    "access": ("open", "open_metrics", "cors_origins", "allow_host"),
    "scheduling": (
        "quantization",
        "block_size",
        "max_batch",
        "max_step_tokens",
        "max_stall",
        "short_step_ms",
        "max_step_s",
    ),
    "limits on requests": (
        "max_requests",
        "max_request_s",
        "max_request_tokens",
        "max_priority_wait_s",
    ),
    "limits on connections and bodies": (
        "max_connections",
        "keep_alive_s",
        "max_unread_s",
        "max_body_bytes",
        "max_body_s",
        "max_bodies_mib",
    ),
    "shutdown": ("drain_notice_s", "drain_s"),
    "log and traces": ("log_format", "log_prompts", "otlp_traces_endpoint"),
}
"""Fields under each heading. Within a heading, flags are in the order of the settings' fields."""


Config = TypeVar("Config", bound=BaseSettings)


def read_arguments(settings: type[Config], groups: Mapping[str, Sequence[str]] | None = None) -> Config:
    """Read the command line. If a flag is wrong, end the program with exit code 2 and a line that names the flag.

    `groups` has the fields under each heading of `--help`, in order.
    """
    # Only for programs that serve: the flags of other programs differ too much from those of other servers.
    hints = FLAGS if issubclass(settings, Settings) else None
    with refusing_flags(settings.model_fields, hints=hints):
        flags: CliSettingsSource[ArgumentParser] = CliSettingsSource(
            settings,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
            add_argument_method=Headings(groups or {}).add_argument,
            formatter_class=help_formatter,
        )
        if groups:  # otherwise the usage line would list all flags, and fill a page
            flags.root_parser.usage = "%(prog)s [--FLAG VALUE ...]"
        return settings(_cli_settings_source=flags(args=True))
