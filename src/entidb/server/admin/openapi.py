"""The OpenAPI document of administration, made from the table of its routes."""

from __future__ import annotations

import re
from typing import Any, Final

from msgspec import json

from entidb.server.admin.asking import PREFIX, ErrorAnswer, Nothing, Route
from entidb.server.admin.routes import ROUTES
from entidb.version import VERSION

#: Where it is served, below the prefix.
DOCUMENT: Final = "openapi.json"
_REFERENCE: Final = "#/components/schemas/{name}"


def document() -> dict[str, Any]:
    """As ``GET /v1/admin/openapi.json`` answers it."""
    kinds = [ErrorAnswer, *(each.gives for each in ROUTES), *(each.takes for each in ROUTES)]
    schemas, components = json.schema_components(kinds, ref_template=_REFERENCE)
    schema_of = {str(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        place = paths.setdefault(PREFIX + route.path, {})
        place[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "EntiDB server administration",
            "version": VERSION,
            "description": "Every call needs a token with the claim `admin`: true, or a list of "
            "databases.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            },
        },
        "security": [{"token": []}],
    }


def _operation(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    named = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    named += [{"name": name, "in": "query", "schema": {"type": "integer"}} for name in route.query]
    named += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in route.texts]
    answers = {
        "200": {"description": "Done.", "content": _json(schema_of[str(route.gives)])},
        "default": {
            "description": "Refused, with a code and a message.",
            "content": _json(schema_of[str(ErrorAnswer)]),
        },
    }
    found: dict[str, Any] = {
        "summary": route.says,
        "operationId": f"{route.method.lower()}_{re.sub('[^a-z]+', '_', route.path).strip('_')}",
        "responses": answers,
    }
    if named:
        found["parameters"] = named
    if route.takes is not Nothing:
        found["requestBody"] = {"required": True, "content": _json(schema_of[str(route.takes)])}
    return found


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
