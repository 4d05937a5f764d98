"""The vocabulary of the demo tasks: plain data, no logic beyond spelling out numbers.

Kept apart from `tasks` because the script that trains the demo base needs the words too,
and so that a reader of the tasks does not have to scroll past them.
"""

from __future__ import annotations

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip

TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

# Only the days of a month need ordinals; those not listed take "th".
IRREGULAR_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip

FIRST_NAMES = (
    "Alice", "Amir", "Anna", "Boris", "Carla", "Chen", "Clara", "Daniel", "David", "Diego",
    "Elena", "Emma", "Erik", "Fatima", "Felix", "Grace", "Hanna", "Hugo", "Ibrahim", "Ines",
    "Isaac", "Ivan", "James", "Jonas", "Julia", "Karim", "Laura", "Leo", "Lucas", "Maria",
    "Martin", "Maya", "Mei", "Nadia", "Nina", "Noah", "Olga", "Omar", "Oscar", "Paul",
    "Peter", "Priya", "Rosa", "Ruth", "Samuel", "Sara", "Simon", "Sofia", "Thomas", "Victor",
)  # fmt: skip

LAST_NAMES = (
    "Adams", "Ahmed", "Andersen", "Baker", "Berg", "Brown", "Bruno", "Carter", "Costa", "Cruz",
    "Dubois", "Evans", "Fischer", "Foster", "Garcia", "Grant", "Hansen", "Hill", "Ito", "Jones",
    "Keller", "Khan", "Kim", "Kumar", "Larsen", "Lee", "Lopez", "Marino", "Meyer", "Moreau",
    "Morgan", "Novak", "Okafor", "Olsen", "Parker", "Patel", "Petrov", "Reed", "Rossi", "Santos",
    "Sato", "Schmidt", "Silva", "Singh", "Smith", "Tanaka", "Walker", "Weber", "Wilson", "Young",
)  # fmt: skip

JOBS = (
    "actor", "architect", "baker", "biologist", "butcher", "carpenter", "chemist", "cook",
    "dentist", "designer", "doctor", "driver", "editor", "electrician", "engineer", "farmer",
    "gardener", "journalist", "judge", "lawyer", "librarian", "mechanic", "musician", "nurse",
    "painter", "pharmacist", "photographer", "pilot", "plumber", "programmer", "sailor",
    "singer", "surgeon", "tailor", "teacher", "translator", "waiter", "writer",
)  # fmt: skip

CITIES = (
    "Athens", "Berlin", "Bogota", "Boston", "Bristol", "Cairo", "Chicago", "Dakar", "Delhi",
    "Denver", "Dublin", "Geneva", "Hamburg", "Hanoi", "Helsinki", "Istanbul", "Kyoto", "Lagos",
    "Leeds", "Lima", "Lisbon", "London", "Lyon", "Madrid", "Milan", "Montreal", "Nairobi",
    "Naples", "Oslo", "Paris", "Porto", "Prague", "Quito", "Riga", "Rome", "Seoul", "Sydney",
    "Tokyo", "Toronto", "Turin", "Vienna", "Vilnius", "Warsaw", "York",
)  # fmt: skip

IDENTIFIER_WORDS = (
    "add", "address", "apply", "array", "backup", "base", "batch", "block", "body", "buffer",
    "build", "cache", "call", "cancel", "channel", "check", "child", "class", "clean", "client",
    "close", "code", "color", "column", "config", "connect", "content", "context", "copy",
    "count", "create", "current", "cursor", "data", "date", "default", "delete", "device",
    "domain", "email", "encode", "engine", "entry", "error", "event", "export", "fetch",
    "field", "file", "filter", "find", "first", "flag", "folder", "format", "frame", "group",
    "handle", "header", "host", "image", "import", "index", "input", "insert", "item", "key",
    "label", "last", "layer", "length", "level", "limit", "line", "link", "list", "load",
    "local", "lock", "log", "map", "mask", "match", "max", "memory", "menu", "merge",
    "message", "method", "min", "mode", "model", "module", "mount", "move", "name", "network",
    "next", "node", "number", "object", "offset", "open", "option", "order", "output", "owner",
    "packet", "page", "parent", "parse", "password", "path", "payment", "pixel", "plan",
    "point", "policy", "port", "price", "print", "process", "product", "profile", "query",
    "queue", "random", "range", "read", "record", "remove", "render", "report", "request",
    "reset", "resource", "response", "result", "retry", "root", "row", "rule", "sample",
    "save", "schema", "score", "search", "select", "send", "server", "session", "set", "shape",
    "sort", "source", "split", "stack", "start", "state", "status", "step", "stop", "store",
    "stream", "string", "style", "table", "tag", "target", "task", "text", "time", "title",
    "token", "total", "trace", "tree", "type", "update", "upload", "user", "valid", "value",
    "version", "view", "weight", "width", "window", "word", "worker", "write", "zone",
)  # fmt: skip


def cardinal(number: int) -> str:
    """A number from 0 to 99 in words, e.g. ``42`` as "forty-two"."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]}-{ONES[ones]}" if ones else TENS[tens]


def ordinal(number: int) -> str:
    """A number from 1 to 99 as an ordinal in words, e.g. ``21`` as "twenty-first"."""
    head, dash, last = cardinal(number).rpartition("-")
    return head + dash + IRREGULAR_ORDINALS.get(last, last + "th")


def ordinal_digits(number: int) -> str:
    """A number as digits and ending, e.g. ``21`` as "21st"."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    teen = 11 <= number % 100 <= 13
    return f"{number}{'th' if teen else endings.get(number % 10, 'th')}"


def year_in_words(year: int) -> str:
    """A year from 1900 to 2099 as it is read aloud, e.g. ``1984`` as "nineteen eighty-four"."""
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return f"two thousand and {ONES[rest]}" if rest else "two thousand"
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {f'oh {ONES[rest]}' if rest < 10 else cardinal(rest)}"
