"""Files of examples as people publish them -> conversations with one answer to learn.

    for example in read_examples("traces.jsonl"):
        print(example.messages, example.turn, example.answer)

jsonl (also compressed, .jsonl.gz), a JSON array, or parquet. A row is a conversation ("messages",
or ShareGPT's "conversations"), or columns for the question, the teacher's thoughts and the
response. docs/DATA.md shows published layouts. Three rules keep anything from being lost in
silence:

    explicit wins         "messages", "prompt", "response", "answer" mean what they say. Other
                          names are guesses, and two guesses for one thing are refused: --columns
                          decides
    null is absent        a null column does not exist (merged data sets are full of them)
    honoured or refused   what means something (tools, system, weight, images) is used or refused;
                          --ignore=KEY,... leaves it out on purpose. Other columns are listed once

Next: collect.py.
"""

import re
from dataclasses import dataclass, field

from plumbing.config import InputError
from plumbing.rows import parse_json, read_rows
from verify import last_boxed

CONVERSATION = ("messages", "conversations", "conversation")
# what data sets call the question, the teacher's thoughts, the response, the answer to compare with
PROMPT = ("prompt", "instruction", "question", "problem", "query", "input")
THOUGHTS = (
    "reasoning_content", "reasoning", "thinking", "thoughts", "thought", "think", "reasoning_text",
    "thinking_trajectory", "thinking_trajectories", "deepseek_thinking_trajectory",
    "gemini_thinking_trajectory", "deepseek_reasoning",
    "model_reasoning", "complex_cot", "chain_of_thought", "cot_content", "rationale", "cot",
)  # fmt: skip
RESPONSE = (
    "response", "completion", "output", "generated_solution", "model_answer", "llm_response",
    "generation", "generations", "attempt", "deepseek_attempt", "gemini_attempt", "deepseek_solution",
)  # fmt: skip
ANSWER = (
    "answer",
    "expected_answer",
    "reference_answer",
    "ground_truth",
    "gold_answer",
    "final_answer",
)
EXPLICIT = {"prompt", "response", "answer", "reasoning_content"}
PUBLISHED = (  # columns that come together, of rows that have more than one candidate
    {"thoughts": "deepseek_thinking_trajectory", "response": "deepseek_attempt"},  # s1K-1.1
    {"thoughts": "thinking_trajectories", "response": "attempt"},  # s1K
)
KINDS = ("messages", "prompt", "thoughts", "response", "answer", "id")  # what --columns can name

MESSAGE_THOUGHTS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thoughts",
    "thought",
    "reasoning_text",
)
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "Human": "user",
    "User": "user",
    "Assistant": "assistant",
    "System": "system",
}
SYSTEM = ("system", "system_prompt")
MEDIA = ("images", "image", "videos", "video", "audio", "audios")
WEIGHTS = (
    "weight",
    "weights",
    "sample_weight",
    "loss_weight",
    "loss_scale",
    "loss",
    "train",
    "training",
    "trainable",
)
DETAILS = ("train_detail", "training_detail", "loss_mask", "labels")
# a "reasoning" that says whether or how much, not what
SWITCHES = {"on", "off", "true", "false", "yes", "no", "low", "medium", "high", "none"}


@dataclass
class Example:
    """One conversation and the turn to learn.

    messages   what the student reads: [{"role", "content", ...}, ...], not empty, the last one not
               the assistant's
    turn       what it is to write: {"role": "assistant", "content"} and perhaps reasoning_content,
               tool_calls, ...
    answer     what a verifier compares with, or None
    variables  what the chat template gets besides: tools, documents, chat_template_kwargs
    """

    where: str  # "file, line 7"
    id: str
    messages: list
    turn: dict
    answer: str | None
    is_gsm8k: bool
    variables: dict = field(default_factory=dict)


def read_examples(path, columns=None, ignore=(), unread=None):
    """A file's examples, one after the other.

    columns  {"prompt", "thoughts", "response", "answer", "messages" or "id": name of the column}:
             no guessing there
    ignore   names of columns, and of keys of messages, to leave out
    unread   a dict to fill with the columns that are not read, {name: number of rows}

    Raises InputError with file and line for a row that is not exactly one conversation and one
    response, and for an id that has been there (that of a row without one is its number).
    """
    seen = {}
    for number, where, content in read_rows(path):
        row = Row(content, where, ignore)
        example = read_example(row, columns or {})
        example.id = str(number) if example.id is None else str(example.id)
        if example.id in seen:
            raise InputError(
                f"{where}: the id {example.id!r} was in line {seen[example.id]} already; "
                f"--ignore=id "
                "numbers the examples instead"
            )
        seen[example.id] = number
        for name in row.unread() if unread is not None else ():
            unread[name] = unread.get(name, 0) + 1
        yield example


# ------------------------------------------------------------------------------------------------
# A row -> an example


def parse_columns(text):
    """--columns=prompt:question,response:output -> {"prompt": "question", "response": "output"}."""
    chosen = {}
    for pair in text.split(",") if text else ():
        kind, colon, name = pair.partition(":")
        if not colon or not name or kind not in KINDS or kind in chosen:
            raise InputError(
                f"--columns={text}: must be kind:column,..., each kind once, of {', '.join(KINDS)}"
            )
        chosen[kind] = name
    return chosen


class Row:
    """The columns of a row that are not null, and which of them have been read."""

    def __init__(self, content, where, ignore=()):
        self.where = where
        self.ignore = set(ignore)
        # a NaN, which only parquet can hold, is how pandas writes null
        self.columns = {
            k: v for k, v in content.items() if v is not None and v == v and k not in self.ignore
        }
        self.read = set()

    def find(self, names):
        """The columns that go by one of these names, in upper or lower case, in the order of the
        names.
        """
        lower = {name.lower(): name for name in self.columns}
        return [lower[name] for name in names if name in lower]

    def take(self, name, kinds):
        """The value of a column, which counts as read from now on.

        Raises InputError for one of another type.
        """
        value = self.columns[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.error(f'"{name}" is of type {type(value).__name__}')
        self.read.add(name)
        return value

    def text(self, name):
        """The text of a column; a list that holds a single text counts as that text, an answer may
        be a number.
        """
        value = self.columns[name]
        if name in ANSWER and isinstance(value, int | float) and not isinstance(value, bool):
            self.read.add(name)
            return str(value)
        if (
            isinstance(value, list)
            and name not in EXPLICIT
            and all(isinstance(part, str) for part in value)
        ):
            if len(value) != 1:
                raise self.error(
                    f'"{name}" holds {len(value)} texts: write a line for the one to be learnt'
                )
            self.columns[name] = value[0]
        return self.take(name, str)

    def unread(self):
        return [name for name in self.columns if name not in self.read]

    def error(self, says):
        return InputError(f"{self.where}: {says}")

    def advice(self):
        """The end of an error about columns: what there is, and the way out."""
        found = ", ".join(self.columns) or "none"
        return (
            f"(columns found: {found}); name them, as in "
            f"--columns=prompt:question,thoughts:cot,response:output,"
            "answer:solution, or rewrite the file: for row in rows: print(json.dumps({"
            '"prompt": row[...], "reasoning_content": row[...], "response": row[...], '
            '"answer": row[...]}))'
        )


def read_example(row, columns):
    """A row -> Example, its id None if it has none. columns: as in read_examples."""
    for kind, name in columns.items():
        if name not in row.columns:
            raise row.error(
                f"--columns={kind}:{name}: this row has no such column, or it is null "
                f"{row.advice()}"
            )
    refuse_what_cannot_be_honoured(row)
    chosen = columns or published(row)

    messages, turn = read_conversation(row, chosen)
    question = messages is None
    if question:
        messages = read_prompt(row, chosen)
    is_gsm8k = False
    if turn is None:
        turn, is_gsm8k = read_response(row, chosen, question)
    add_thoughts(row, chosen, turn)
    add_system_and_history(row, messages)

    if not messages or empty(messages[-1]):
        raise row.error("no prompt, or an empty one")
    if messages[-1]["role"] == "assistant":
        raise row.error(
            '"messages" must end before the response, with a turn that is not the assistant\'s'
        )
    if empty(turn):
        raise row.error("no response, or an empty one")
    check_weights(row, messages, turn)
    name = columns.get("id", "id")
    return Example(
        where=row.where,
        id=row.take(name, (str, int)) if name in row.columns else None,
        messages=messages,
        turn=turn,
        answer=read_answer(row, chosen, is_gsm8k),
        is_gsm8k=is_gsm8k,
        variables=read_variables(row),
    )


def published(row):
    """{kind: name of the column} of a row in a published layout with more than one candidate, or
    {}.
    """
    if not row.find(CONVERSATION) and not row.find(["response"]):
        for layout in PUBLISHED:
            if row.columns.keys() >= set(layout.values()):
                return layout
    return {}


def read_conversation(row, chosen):
    """-> the messages before the answer and the turn to learn; None, None if the row holds no
    conversation.

    The turn is None where the conversation ends before it.
    """
    names = [chosen["messages"]] if "messages" in chosen else row.find(CONVERSATION)
    if not names or "prompt" in chosen:
        return None, None
    if len(names) > 1:
        raise row.error(f"{' and '.join(names)}: which of them? {row.advice()}")
    messages = read_messages(row, names[0])
    prompt = row.columns.get("prompt")
    # UltraChat and others repeat the first question as "prompt"
    if prompt is not None and prompt not in [message["content"] for message in messages]:
        raise row.error('needs either "prompt" or "messages", not both')
    row.read.add("prompt")
    if not messages:
        raise row.error(f'"{names[0]}" is empty')
    if row.find(["response"]) or "response" in chosen or messages[-1]["role"] != "assistant":
        return messages, None
    return messages[:-1], messages[-1]


def read_prompt(row, chosen):
    """The messages of a row that has its question in a column of its own."""
    name = chosen.get("prompt") or only(row, "prompt", PROMPT)
    if name is None:
        raise row.error(
            f'no prompt, or an empty one: needs either "prompt" or "messages" {row.advice()}'
        )
    if isinstance(row.columns[name], list) and all(
        isinstance(part, dict) for part in row.columns[name]
    ):
        return read_messages(row, name)  # TRL's conversational prompts
    text = row.text(name)
    if name == "instruction" and "prompt" not in chosen and "input" in row.columns:
        more = row.text("input")
        # alpaca's two halves, joined as LLaMA-Factory does
        text = f"{text}\n{more}" if more else text
    return [{"role": "user", "content": text}]


def read_response(row, chosen, question):
    """-> the turn to learn, and whether this is GSM8K's form.

    That is a response in "answer", which ends in "#### number".
    """
    name = chosen.get("response") or only(row, "response", RESPONSE)
    if name is not None:
        value = row.columns[name]
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            # TRL's conversational completions
            return read_messages(row, name)[0], False
        return {"role": "assistant", "content": row.text(name)}, False
    answer = row.columns.get("answer")
    if question and not row.find(["solution"]) and isinstance(answer, str) and "####" in answer:
        return {"role": "assistant", "content": row.take("answer", str)}, True
    # LIMO, and Numina: the solution is what to learn
    if question and row.find(["solution"]):
        return {"role": "assistant", "content": row.text(row.find(["solution"])[0])}, False
    hint = (
        ', or "answer" must end in #### and the number, as GSM8K\'s'
        if row.find(["question"])
        else ""
    )
    raise row.error(f"no response, or an empty one{hint} {row.advice()}")


def add_thoughts(row, chosen, turn):
    """Thoughts from a column of their own become the turn's reasoning_content."""
    names = [chosen["thoughts"]] if "thoughts" in chosen else row.find(THOUGHTS)
    # Nemotron says "reasoning": "on"; a number or a truth value is no thought either
    names = [n for n in names if not is_switch(row.columns[n])]
    held = turn["content"] + turn.get("reasoning_content", "")
    texts = {row.text(name).strip(): name for name in names}
    missing = {text: name for text, name in texts.items() if text not in held}
    if not missing:
        return
    if has_thoughts(held) or "reasoning_content" in turn:
        # there are thoughts already: these columns are listed with the unread ones
        row.read -= set(missing.values())
        return
    if len(missing) > 1:
        raise row.error(
            f"{' and '.join(missing.values())}: which of them are the thoughts? {row.advice()}"
        )
    turn["reasoning_content"] = row.text(next(iter(missing.values())))


def add_system_and_history(row, messages):
    """system (or system_prompt) and history (LLaMA-Factory's earlier turns) go in front."""
    for name in row.find(["history"]):
        pairs = row.take(name, list)
        turns = []
        for pair in pairs:
            if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
                raise row.error(f'"{name}" must be a list of [question, answer]')
            turns.append({"role": "user", "content": pair[0]})
            turns.append({"role": "assistant", "content": pair[1]})
        messages[:0] = turns
    for name in row.find(["prev_messages"]):  # GeneralThought's
        messages[:0] = read_messages(row, name)
    for name in row.find(SYSTEM):
        text = row.take(name, str)
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        if text.strip() and system is None:
            messages.insert(0, {"role": "system", "content": text})
        elif text.strip() and text != system:
            raise row.error(f'"{name}" and the first message are two different system prompts')


def read_answer(row, chosen, is_gsm8k):
    """What the verifier compares with, a text, or None."""
    name = chosen.get("answer") or only(row, "answer", ANSWER)
    if name in row.read and not is_gsm8k and "answer" not in chosen:
        return None  # it has been read as the response
    if name is None:
        for solution in row.find(["solution", "ground_truth_solution"]):
            if solution not in row.read and isinstance(row.columns[solution], str | int | float):
                return gold_of(str(row.take(solution, (str, int, float))))
        return None
    answer = str(row.take(name, (str, int, float)))
    _, mark, number = answer.rpartition("####")
    if is_gsm8k:
        number = number.strip().replace(",", "")
        if not number:
            raise row.error('"answer" must end in #### and the number')
        return number
    return number.strip() if mark else answer


def gold_of(solution):
    r"""The answer in a worked solution.

    What it puts into \boxed{} or behind ####; a solution of one short line is the answer.
    """
    boxed = last_boxed(solution)
    if boxed is not None:
        return boxed
    if "####" in solution:
        return solution.rpartition("####")[2].strip()
    short = len(solution) <= 100 and "\n" not in solution.strip()
    return solution.strip() if short and solution.strip() else None


def read_variables(row):
    """tools, documents and chat_template_kwargs, as objects or as JSON in a text."""
    variables = {}
    for name, kind in (("tools", list), ("documents", list), ("chat_template_kwargs", dict)):
        if name not in row.columns:
            continue
        value = row.columns[name]
        if isinstance(value, str) and value.strip():
            value = parse_json(value.encode(), f'{row.where}: "{name}"')
        if value and not isinstance(value, kind):
            raise row.error(f'"{name}" is of type {type(value).__name__}, not {kind.__name__}')
        row.read.add(name)
        if value:
            variables |= value if kind is dict else {name: value}
    return variables


def only(row, kind, names):
    """The one column that goes by these names, or None; "prompt", "response" and "answer" win."""
    found = row.find(names)
    explicit = [name for name in found if name in EXPLICIT]
    if explicit:
        return explicit[0]
    if kind == "prompt" and "instruction" in found:
        found = [name for name in found if name != "input"]  # alpaca's second half
    if len(found) > 1:
        raise row.error(f"{' and '.join(found)}: which of them is the {kind}? {row.advice()}")
    return found[0] if found else None


def empty(turn):
    """Does a turn say nothing? (A call of a tool needs no words.)"""
    return (
        not turn["content"].strip() and not turn.get("tool_calls") and not turn.get("function_call")
    )


def has_thoughts(text):
    return bool(re.search(r"</think>|<think>|<\|(begin|end)_of_thought\|>", text))


def is_switch(value):
    """Does a column called "reasoning" say whether, not what, the teacher thought?"""
    if isinstance(value, bool | int | float):
        return True
    return isinstance(value, str) and value.strip().lower() in SWITCHES


# ------------------------------------------------------------------------------------------------
# Messages


def read_messages(row, name):
    """A column of messages -> a new list of {"role", "content", ...}, all texts in one form.

    ShareGPT's from and value are role and content; content parts of text become one text, and
    thoughts, under whichever name, reasoning_content. Other keys stay as they are, for the
    template to render.
    """
    return [read_message(row, name, message) for message in row.take(name, list)]


def read_message(row, name, message):
    if not isinstance(message, dict):
        raise row.error(f'"{name}" must be objects with "role" and "content", both texts')
    message = {
        key: value for key, value in message.items() if value is not None and key not in row.ignore
    }
    if "role" not in message and "from" in message:
        sharegpt = {"from": "role", "value": "content"}
        message = {sharegpt.get(key, key): value for key, value in message.items()}
    role = message.pop("role", None)
    content = message.pop("content", None)
    thoughts = []
    if isinstance(content, list):
        content, thoughts = join_parts(row, name, content)
    for key in MESSAGE_THOUGHTS:
        value = message.pop(key, "")
        if not isinstance(value, str):
            raise row.error(f'"{name}": "{key}" is of type {type(value).__name__}')
        if value.strip() and value not in thoughts:
            thoughts.append(value)
    if len(thoughts) > 1:
        raise row.error(f'"{name}": one turn has its thoughts under two names, and they differ')
    if content is None and (thoughts or message.get("tool_calls") or message.get("function_call")):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise row.error(f'"{name}" must be objects with "role" and "content", both texts')
    read = {"role": ROLE_NAMES.get(role, role), "content": content}
    if thoughts:
        read["reasoning_content"] = thoughts[0]
    return read | {key: value for key, value in message.items() if value not in ([], {}, "")}


def join_parts(row, name, parts):
    """Content parts, [{"type": "text", "text": ...}, ...] -> their text, and their thoughts.

    The latter are a list of at most one text.
    """
    texts = []
    thoughts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise row.error(f'"{name}": a content part is of type {type(part).__name__}')
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.pop("type", "text")
        is_thought = kind in ("thinking", "reasoning")
        text = part.pop(kind if is_thought and kind in part else "text", None)
        if not (is_thought or kind == "text") or not isinstance(text, str) or part:
            raise row.error(
                f'"{name}": a content part of type {kind!r} with {", ".join(part) or "no text"} '
                "cannot be read; only texts and thoughts can"
            )
        (thoughts if is_thought else texts).append(text)
    return "".join(texts), ["\n".join(thoughts)] if thoughts else []


# ------------------------------------------------------------------------------------------------
# What means something but cannot be done


def refuse_what_cannot_be_honoured(row):
    """Raise InputError for a column that asks for more than reading a text."""
    for name in row.find(MEDIA):
        if row.columns[name]:
            raise row.error(f'"{name}": only text can be learnt; --ignore={name} leaves it out')
        row.read.add(name)
    for name in row.find(WEIGHTS):
        if row.columns[name] in (1, True):
            row.read.add(name)
        elif isinstance(row.columns[name], bool | int | float):
            raise row.error(
                f'"{name}" is {row.columns[name]}, but all examples count the same here: take '
                f"this one "
                f"out, or --ignore={name}"
            )
    if row.columns.get("functions"):
        raise row.error(
            '"functions": call it "tools", a list of {"type": "function", "function": {...}}'
        )
    for name in row.find(DETAILS):
        if isinstance(row.columns[name], list | dict):
            raise row.error(
                f'"{name}": which tokens to learn is chosen by select.py; --ignore={name} leaves '
                f"it out"
            )
    if row.columns.get("label") is False:
        raise row.error(
            '"label" is false: a response that is not to be imitated; take this line out'
        )


def check_weights(row, messages, turn):
    """Raise InputError where a weight, or train: true, asks for another turn than the last one."""
    for message in [*messages, turn]:
        for key in [key for key in WEIGHTS if key in message]:
            value = message.pop(key)
            if value not in (0, 1):
                raise row.error(
                    f'a message has "{key}": {value!r}; only 0, 1, false and true are understood'
                )
            if value and message is not turn:
                raise row.error(
                    f'an earlier turn has "{key}": {value!r}, but only the last turn is learnt: '
                    f"write the "
                    f"conversation up to each such turn as a line of its own, or "
                    f"--ignore={key}"
                )
            if not value and message is turn:
                raise row.error(
                    f'the last turn has "{key}": {value!r}: nothing to learn; take the line out'
                )
