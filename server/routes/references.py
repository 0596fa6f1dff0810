"""Lookup of the adapters that a path, a query or `model` names, off the event loop, and errors for unknown ones."""

from collections.abc import Collection, Sequence

from starlette.concurrency import run_in_threadpool

from lori.errors import UnknownAdapterError
from lori.names import AUTO
from lori.names import unknown_adapter as unknown_name
from server.access.caller import Caller
from server.engine.adapters.registry import AmbiguousVersionError, FaultyAdapterError, Registered, resolve
from server.engine.generate_request import RefusedError
from server.errors import FieldError, IncompleteMergeError
from server.migration.names import IsKnown, unknown_adapter, unknown_model
from server.schemas.model_names import UnknownModelError, is_base
from server.service.service import Service


async def find(service: Service, caller: Caller, references: Sequence[str], field: str) -> list[Registered]:
    """Return the adapters of references, each a name or `name@version`.

    Raises `FieldError` if one is unknown, faulty or ambiguous, or a named merge, and `RefusedError` for `auto`.
    """
    if AUTO in references:
        raise RefusedError(field, f"is {AUTO!r}, which is no adapter: name an adapter")
    if merge := next((name for name in references if service.merges.find(name, caller.may_use)), None):
        raise FieldError(field, UnknownAdapterError(merge, (), (), f"it is a named merge, see GET /merges/{merge}"))
    try:
        return await run_in_threadpool(lambda: [resolve(service.registry, reference, caller.may_use) for reference in references])
    except (UnknownAdapterError, FaultyAdapterError, AmbiguousVersionError) as error:
        raise FieldError(field, error) from error


async def find_model(service: Service, caller: Caller, model: str, references: Sequence[str]) -> list[Registered]:
    """Return the adapters of `references`, which `model` names; a named merge gives its adapters.

    Raises `UnknownModelError`; `FieldError` as `find` does, and if a merge's adapters are not all there.
    """
    try:
        return await find(service, caller, service.merges.references(references, caller.may_use), "model")
    except IncompleteMergeError as error:
        raise FieldError("model", error) from error
    except FieldError as error:
        if isinstance(error.error, UnknownAdapterError):
            raise explained_model(service, caller, model, error.error) from error
        raise


def explained_model(service: Service, caller: Caller, model: str, error: UnknownAdapterError) -> UnknownModelError:
    """Return the error for a `model` that names an unknown adapter, with a suggestion."""
    merges, selector = service.merges.complete(caller.may_use), service.selector
    return unknown_model(
        model,
        _with_merges(service, caller, merges, error),
        service.base_model,
        _known_to(service, caller),
        kinds="adapters and merges" if merges else "adapters",
        has_auto=selector is not None and selector.can_select(caller.may_use, caller.policy),
    )


def explained_adapter(service: Service, caller: Caller, error: UnknownAdapterError, field: str) -> UnknownAdapterError:
    """Return the error for an unknown adapter in `field`, with a suggestion."""
    is_of_base = is_base(error.name, service.base_names)
    error = _with_merges(service, caller, service.merges.complete(caller.may_use), error)
    return unknown_adapter(error, field, service.base_model, _known_to(service, caller), is_of_base=is_of_base)


def _with_merges(service: Service, caller: Caller, merges: Collection[str], error: UnknownAdapterError) -> UnknownAdapterError:
    """Return the error with the names of the caller's `merges` among those that it suggests."""
    if not merges:
        return error
    return unknown_name(error.name, [*service.registry.names_for(caller.may_use), *merges])


def _known_to(service: Service, caller: Caller) -> IsKnown:
    def is_known(name: str) -> bool:
        is_adapter = name in service.registry.by_name and caller.may_use(name)
        return is_adapter or service.merges.find(name, caller.may_use) is not None

    return is_known
