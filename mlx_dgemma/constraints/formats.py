"""JSON Schema's string formats as patterns: texts that every reader takes, not all that some do."""

_DATE = (
    r"(19|20)\d\d-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_HOST = rf"({_LABEL}\.){{1,5}}[A-Za-z]{{2,24}}"
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P([1-9]\d{0,3}D(T[1-9]\d{0,3}H)?|T[1-9]\d{0,3}[HMS]|[1-9]\d{0,3}[WMY])",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "hostname": _HOST,
    "uri": rf"https?://{_HOST}(:\d{{1,4}})?(/[A-Za-z0-9._~!$&'()*+,;=:@%-]*)*",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": r"[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}",
}
# Those of the JSON Schema standard that are seldom asked for, in their plainest forms.
_NAME = r"[A-Za-z0-9_.-]{1,40}"
FORMATS |= {
    "json-pointer": rf"(/{_NAME})*",
    "relative-json-pointer": rf"(0|[1-9]\d{{0,3}})(#|(/{_NAME})*)",
    "uri-template": rf"{FORMATS['uri']}(\{{[A-Za-z0-9_]{{1,20}}\}})?",
    "regex": r"[A-Za-z0-9 _-]*",
}
# Names that pydantic gives to types of its own.
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-%d[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
FORMATS |= {f"uuid{version}": _UUID % version for version in range(1, 9)}
FORMATS |= {
    "ipvanyaddress": FORMATS["ipv4"],
    "ipv4interface": rf"{FORMATS['ipv4']}/(3[0-2]|[12]?\d)",
    "ipv6interface": rf"{FORMATS['ipv6']}/(12[0-8]|1[01]\d|[1-9]?\d)",
    "ipv4network": rf"{FORMATS['ipv4']}/32",
    "ipv6network": rf"{FORMATS['ipv6']}/128",
    "ipvanynetwork": rf"{FORMATS['ipv4']}/32",
    "base64url": r"([A-Za-z0-9_-]{4})*",
    "json-string": r"[1-9]\d{0,8}|true|false|null",
}
FORMATS["idn-hostname"] = FORMATS["hostname"]
FORMATS["iri"] = FORMATS["iri-reference"] = FORMATS["uri"]
FORMATS["idn-email"] = FORMATS["email"]
FORMATS["uri-reference"] = FORMATS["url"] = FORMATS["uri"]
