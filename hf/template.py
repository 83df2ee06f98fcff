"""Chat templates: the Jinja program in a checkpoint that turns messages into the text its model
was trained on.

    prompt, response = cut(tokenizer, messages, turn)

A template is downloaded code. It runs in jinja2's immutable sandbox, in the surroundings that
transformers gives it, so that both write the same text. And it is written for chatting, not for
training: templates drop turns whose role they do not know, take thoughts out, leave out tools.
`cut` finds out what has become of every part of a conversation, and refuses one that is not all
there.

Next: hf/families.py.
"""

import hashlib
import json
import re
from datetime import datetime

from plumbing.config import InputError, read_json

OPENS = re.compile(r"<think>\s*$")  # a prompt after which the student is thinking
CLOSES = re.compile(r"</think>\s*$")  # one after which it must not think
# what Qwen3's template writes before an answer without thoughts
NO_THOUGHTS = re.compile(r"\s*(<think>\s*)?(</think>\s*)?")
THOUGHTS = "reasoning_content"
TAG = re.compile(r"</?[a-z_]+>")


# ------------------------------------------------------------------------------------------------
# Reading a template


def read_template(folder):
    """The source of a checkpoint's chat template, None if it has none.

    chat_template.jinja wins over tokenizer_config.json, as in transformers. Of several templates
    in the latter it is the one called "default". Raises what reading and looking up raise.
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
    # {% generation %} marks the assistant's words for training masks; what it encloses is written
    # as it stands
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    return environment.from_string(source)


def control_tokens(tokenizer, rendered):
    """The tokens with which a template marks turns: no text of a user may hold them.

    Those that occur in the template or in what it rendered, and the named ones (EOS, ...). Tags
    such as <think> and <tool_call> are content.
    """
    names = set(tokenizer.names.values())
    source = tokenizer.template_source or ""
    found = {name for name in tokenizer.added if name in source or name in rendered}
    return {name for name in found if name in names or not TAG.fullmatch(name)} | (
        names & tokenizer.added.keys()
    )


def hash_of(source):
    """A template's identity, sha256 of its text; None for no template."""
    return hashlib.sha256(source.encode()).hexdigest() if source else None


def fixed_date(day):
    """strftime_now for templates that write today's date: `day`, YYYY-MM-DD.

    So tomorrow's data are the same. Without a day the function that comes back refuses.
    """
    moment = datetime.fromisoformat(day) if day else None

    def strftime_now(form):
        if moment is None:
            raise InputError(
                f"it writes today's date; --date={datetime.now():%Y-%m-%d} keeps it the same "
                f"tomorrow"
            )
        return moment.strftime(form)

    return strftime_now


def parse_kwargs(text):
    """--template_kwargs -> {variable: value}."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"--template_kwargs={text}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(
            f"--template_kwargs={text}: must be a JSON object, as '{{\"enable_thinking\": false}}'"
        )
    taken = value.keys() & {
        "messages",
        "add_generation_prompt",
        "strftime_now",
        "tokenize",
        "tools",
        "documents",
    }
    if taken:
        raise InputError(f"--template_kwargs: {min(taken)!r} is not for you to set")
    return value


# ------------------------------------------------------------------------------------------------
# A conversation, cut where the student begins to write


def cut(tokenizer, messages, turn, variables=None, tags=False):
    """-> the text of the prompt, and that of the response, which may lack the token that ends it.

    messages   [{"role", "content", ...}, ...], the turns before
    turn       {"role": "assistant", "content", ...}, the one to learn
    variables  what the template gets besides
    tags       write thoughts that the template leaves out as <think>...</think> in front of the
               answer, and do not repeat a <think> that the prompt ends in

    A turn that is only content is the response verbatim: templates tidy up answers, and take out
    thoughts. One that holds more (reasoning_content, tool_calls) is what the template writes for
    it. Raises InputError where the template leaves out anything that was given, or where the
    response would not stand where the template puts it.
    """
    variables = dict(variables or {})

    thoughts = name_of_thoughts(tokenizer.template_source)

    def render(turns, **how):
        turns = [
            {thoughts if key == THOUGHTS else key: value for key, value in turn.items()}
            for turn in turns
        ]
        return tokenizer.apply_chat_template(turns, tokenize=False, **variables, **how)

    turn = turn | {"content": without_end(tokenizer, turn["content"])}
    check_given(tokenizer, [*messages, turn], variables)
    prompt = render(messages, add_generation_prompt=True)
    for index in turns_left_out(render, messages):
        raise InputError(
            f"the chat template leaves out the turn of role {messages[index]['role']!r}: "
            "roles are system, user, assistant and tool; rename it or take it out"
        )
    for message in messages:
        check_rendered(message, prompt)
    check_variables_rendered(variables, prompt)
    body, end = to_the_end(tokenizer, after_prompt(prompt, render([*messages, turn])))
    if turn.keys() <= {"role", "content"}:
        response = verbatim(turn["content"], body, asked=prompt != render(messages))
    else:
        response = body + end
        missing = [key for key in turn if key != "role" and not all_occur(turn[key], response)]
        if missing:
            response = with_tags(turn, prompt, missing, tags)
    if tags and OPENS.search(prompt):
        response = re.sub(r"^\s*<think>\n?", "", response)  # the prompt has it already
    check_thinking(prompt, response)
    return prompt, response


def uncut(tokenizer, messages, turn, variables=(), tags=False):
    """The same where there is no template, or the text has been rendered already.

    One prompt and one response; thoughts only as tags.
    """
    if (
        len(messages) > 1
        or messages[0].keys() > {"role", "content"}
        or messages[0]["role"] != "user"
    ):
        raise InputError("no chat template, so messages cannot be rendered; give a prompt")
    others = turn.keys() - {"role", "content"} | set(variables)
    if others - {"reasoning_content"} or (others and not tags):
        advice = " (--thoughts=tags writes thoughts)" if "reasoning_content" in others else ""
        raise InputError(f"no chat template to write {min(others)!r}: put it into the text{advice}")
    prompt = messages[0]["content"]
    turn = turn | {"content": without_end(tokenizer, turn["content"])}
    response = with_tags(turn, prompt, ["reasoning_content"], tags) if others else turn["content"]
    check_thinking(prompt, response)
    return prompt, response


def name_of_thoughts(source):
    """The key under which a template looks for a turn's thoughts."""
    for name in (THOUGHTS, "reasoning", "thinking", "thoughts", "thought"):
        if re.search(rf"(\.|['\"]){name}\b", source):
            return name
    return THOUGHTS


def writes_empty_thoughts(tokenizer, variables):
    """Does the template write <think></think> before an answer without thoughts, where its prompt
    does not?
    """
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "T3S-ANSWER"}
    prompt = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, tokenize=False, **variables
    )
    full = tokenizer.apply_chat_template([question, answer], tokenize=False, **variables)
    return full.startswith(prompt) and full[len(prompt) :].lstrip().startswith("<think>")


def after_prompt(prompt, full):
    """What the rendering of the whole conversation has behind the prompt."""
    if full.startswith(prompt):
        return full[len(prompt) :]
    # what only the prompt has is an opened <think>, or empty thoughts: templates take them out of
    # a finished turn
    begun = re.sub(r"<think>\s*(</think>\s*)?$|</think>\s*$", "", prompt)
    if not full.startswith(begun):
        raise InputError(
            f"the chat template asks for an answer with {prompt[-40:]!r}, but does not write it "
            f"that way"
        )
    return full[len(begun) :]


def to_the_end(tokenizer, tail):
    """What the template wrote for the turn, and the token behind it that ends it ("" if there is
    none).
    """
    ends = [(tail.find(end), end) for end in tokenizer.ends if end in tail]
    if not ends:
        return tail.rstrip(), ""
    at, end = min(ends)
    return tail[:at], end


def verbatim(content, body, asked):
    """The response of a turn that is only content, for which the template writes `body`.

    asked: does the template write a generation prompt? Then what it writes in front of the content
    is the student's to write as well: GLM's line feed, gpt-oss' channel; but no empty thoughts.
    """
    whole = content.strip()
    thoughts, _, answer = content.rpartition("</think>")
    written = body.rstrip()
    if written.endswith(whole):
        before = written.removesuffix(whole)
        if before.isspace() and not content[:1].isspace():
            return before + content
        if asked and not NO_THOUGHTS.fullmatch(before):
            return before + content
    elif written.endswith(answer.strip()):
        before = re.sub(r"</?think>", "", written.removesuffix(answer.strip()))
        before = before.replace(thoughts.replace("<think>", "").strip(), "")
    else:
        raise InputError(
            "the chat template leaves out the response, or changes it; render the text yourself "
            "and say "
            "--template=none"
        )
    if not NO_THOUGHTS.fullmatch(before):
        raise InputError(
            f"the chat template has no generation prompt: it writes {before!r} only before a given "
            "answer; end it with {% if add_generation_prompt %}...{% endif %}"
        )
    return content


def with_tags(turn, prompt, missing, tags):
    """The response of a turn whose thoughts the template leaves out: <think>, thoughts, </think>,
    content.

    Only where this is asked for, or where the prompt ends in <think> and so leaves no doubt.
    """
    opened = OPENS.search(prompt)
    if missing != ["reasoning_content"] or turn.keys() > {"role", "content", "reasoning_content"}:
        raise InputError(
            f"the chat template leaves out {missing[0]!r} of the response, or parts of it; "
            f"--ignore={missing[0]} if it should"
        )
    if not opened and not tags:
        raise InputError(
            "the chat template leaves out the thoughts ('reasoning_content'); --thoughts=tags "
            "writes them "
            "as <think>...</think> in front of the answer"
        )
    begin = "<think>\n" if not opened else "" if prompt[-1].isspace() else "\n"
    return f"{begin}{turn['reasoning_content'].strip()}\n</think>\n\n{turn['content'].lstrip()}"


# ------------------------------------------------------------------------------------------------
# Is everything there?


def check_given(tokenizer, turns, variables):
    """Raise InputError for control tokens in a text, and for variables unknown to the template."""
    for message in turns:
        text = message["content"] + message.get("reasoning_content", "")
        for name in tokenizer.control:
            if name in text:
                raise InputError(
                    f"a text holds {name!r}, with which the chat template marks turns: take it "
                    "out, or, if the text has been rendered already, say --template=none"
                )
    for name in variables.keys() - {"strftime_now"}:
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.template_source):
            raise InputError(f"the chat template does not know {name!r}, it would be left out")


def check_variables_rendered(variables, prompt):
    for name in ("tools", "documents"):
        if not all_occur(variables.get(name), prompt):
            raise InputError(
                f"the chat template leaves out {name!r}, or parts of it; --ignore={name} if it "
                "should"
            )


def turns_left_out(render, messages):
    """The places of turns that the template does not write at all, found by a marker in the place
    of each content.
    """
    marks = [f"T3S-{i}-MARK" for i in range(len(messages))]
    marked = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
    try:
        text = render(marked)
    except InputError:
        # a template that wants something of a content: the contents themselves are looked for
        # anyway
        return []
    return [
        i for i, mark in enumerate(marks) if mark not in text and messages[i]["content"].strip()
    ]


def check_rendered(message, prompt):
    """Raise InputError if a turn before the answer is not all in the prompt; templates may take
    its thoughts out.
    """
    content = message["content"]
    is_answer = message["role"] == "assistant"
    if not occurs(content.rpartition("</think>")[2] if is_answer else content, prompt):
        raise InputError(
            f"the chat template leaves out, or changes, the {message['role']}'s {content[:40]!r}"
        )
    known = {"role", "content", "tool_call_id", "reasoning_content" if is_answer else ""}
    known |= {"name"} if message["role"] == "tool" else set()
    for key in message.keys() - known:
        if not all_occur(message[key], prompt):
            raise InputError(
                f"the chat template leaves out {key!r} of a turn of role {message['role']!r}; "
                f"--ignore={key} if it should"
            )


def texts_of(value):
    """All that a JSON value says, as texts: names of arguments too, but not the ids of calls and
    their kind.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("id", "type", "index"):
                yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def occurs(text, rendering):
    """Is the text in the rendering, but for blanks around it: as it is, or as JSON spells it?"""
    text = text.strip()
    if text in rendering:
        return True
    return (
        json.dumps(text)[1:-1] in rendering
        or json.dumps(text, ensure_ascii=False)[1:-1] in rendering
    )


def all_occur(value, rendering):
    return all(occurs(text, rendering) for text in texts_of(value))


def without_end(tokenizer, text):
    """A text without the end of its turn, which is put there afterwards, once."""
    short = text.rstrip()
    for end in tokenizer.ends:
        if short.endswith(end):
            return without_end(tokenizer, short.removesuffix(end))
    return text


def check_thinking(prompt, response):
    """Raise InputError where prompt and response together open or close <think> twice, or never."""
    before, closes, _ = response.partition("</think>")
    opens = "<think>" in before
    if OPENS.search(prompt):
        if opens:
            raise InputError(
                "the chat template has opened <think> already; take it off the response, or say "
                "--thoughts=tags, which does"
            )
        if not closes:
            raise InputError(
                "the chat template has opened <think>, and the response never closes it: give it "
                "thoughts and a </think>, or let the template open none "
                "(--template_kwargs)"
            )
    elif CLOSES.search(prompt) and (opens or closes):
        raise InputError(
            "the chat template has closed <think>, and the response has thoughts: take them out, "
            "or let "
            "the template think (--template_kwargs)"
        )
    elif closes and not opens:
        raise InputError(
            "the response closes <think>, which nothing has opened; put <think> in front of it"
        )
