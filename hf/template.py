"""Chat templates: the Jinja program in a checkpoint that turns messages into the text its model was trained on.

A template is downloaded code. It runs in jinja2's immutable sandbox, in the surroundings that transformers
gives it, so that both write the same text.

Next: hf/families.py.
"""

import json
import re
from datetime import datetime

from plumbing.config import read_json


def read_template(folder):
    """The source of a checkpoint's chat template, None if it has none.

    chat_template.jinja wins over tokenizer_config.json, as in transformers. Of several templates in the latter it is
    the one called "default". Raises what reading and looking up raise.
    """
    beside = folder / "chat_template.jinja"
    if beside.exists():
        return beside.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}["default"]
    return template or None


def compile_template(source):
    """Jinja source -> an object whose render(messages=..., ...) gives the text."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own tojson escapes <, > and & for HTML; transformers' does not
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks the assistant's words for training masks; what it encloses is written as it stands
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    return environment.from_string(source)
