"""A run as JUnit XML, as CI systems read it.

A difference is a `failure`, a check that could not be carried out an `error`, and what was not
tried is `skipped` with its reason: none of them looks like a success.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any, Final

_NOT_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAME: Final = "nemotron-bridge"


def junit(data: Mapping[str, Any]) -> str:
    """Evidence as one JUnit document."""
    totals = data["totals"]
    counts = {
        "tests": str(len(data["cases"])),
        "failures": str(totals["failed"]),
        "errors": str(totals["error"]),
        "skipped": str(totals["not run"]),
        "time": f"{data['seconds']:.3f}",
    }
    root = ET.Element("testsuites", {"name": _NAME, **counts})
    name, started = _clean(data["suite"] or _NAME), data["started"]
    suite = ET.SubElement(root, "testsuite", {"name": name, "timestamp": started, **counts})
    properties = ET.SubElement(suite, "properties")
    for name, value in {
        "verdict": data["verdict"],
        "command": " ".join(data["command"]),
        "code_sha256": data["code_sha256"],
    }.items():
        ET.SubElement(properties, "property", name=name, value=_clean(value))
    for case in data["cases"]:
        _add(suite, case)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add(suite: ET.Element, case: Mapping[str, Any]) -> None:
    found = ET.SubElement(
        suite,
        "testcase",
        classname=_clean(f"{case['check']}.{case['model']}"),
        name=_clean(case["id"]),
        time=f"{case['seconds']:.3f}",
    )
    message = _clean(case["summary"])
    match case["status"]:
        case "failed":
            child = ET.SubElement(found, "failure", message=message, type=_clean(case["check"]))
            child.text = _clean("\n".join([case["summary"], *case["places"]]))
        case "error":
            kind = message.partition(":")[0].partition(" ")[0]
            child = ET.SubElement(found, "error", message=message, type=kind)
            child.text = _clean(case.get("traceback") or case["summary"])
        case "not run":
            ET.SubElement(found, "skipped", message=message)
        case _:
            ET.SubElement(found, "system-out").text = message


def _clean(text: str) -> str:
    """Without what XML 1.0 cannot hold, escapes of terminals among it."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
