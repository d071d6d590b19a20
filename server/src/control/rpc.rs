//! JSON-RPC 2.0 (<https://www.jsonrpc.org/specification>), one object a line, without batches.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What went wrong, as it stands in a reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) code: i32,
    pub(super) message: String,
}

impl Failure {
    /// It is no JSON.
    const PARSE: i32 = -32700;
    /// It is JSON, but no request.
    const INVALID_REQUEST: i32 = -32600;
    const NO_METHOD: i32 = -32601;
    const INVALID_PARAMS: i32 = -32602;
    /// There is no such device.
    pub(super) const NO_DEVICE: i32 = 1;
    /// A client is connected.
    pub(super) const IN_USE: i32 = 2;
    /// Something is still at work; it can be tried again.
    pub(super) const BUSY: i32 = 3;
    /// The description of a device makes no sense.
    pub(super) const INVALID_DEVICE: i32 = 4;
    /// The system or the storage refused.
    pub(super) const SYSTEM: i32 = 5;
    /// It would lose data.
    pub(super) const LOSES_DATA: i32 = 6;
    /// No client is connected.
    pub(super) const NO_CLIENT: i32 = 7;

    pub(super) fn new(code: i32, message: impl ToString) -> Self {
        Self { code, message: message.to_string() }
    }

    pub(super) fn no_method(method: &str, known: &[&str]) -> Self {
        Self::new(Self::NO_METHOD, format!("there is no method {method:?}; there are {}", known.join(", ")))
    }

    pub(super) fn invalid_params(why: impl ToString) -> Self {
        Self::new(Self::INVALID_PARAMS, why)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    jsonrpc: String,
    method: String,
    #[serde(default)]
    params: Value,
    /// None for a notification, which is not answered.
    id: Option<Value>,
}

/// What a reply says.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Reply {
    pub(super) id: Value,
    pub(super) result: Option<Value>,
    pub(super) error: Option<Failure>,
}

/// Carries out what a line asks for; the line to be sent, if it wants an answer.
pub(super) fn answer(line: &[u8], call: impl FnOnce(&str, Value) -> Result<Value, Failure>) -> Option<Vec<u8>> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return None;
    }
    match decode(line) {
        Ok(Request { method, params, id, .. }) => {
            let result = call(&method, params);
            id.map(|id| encode(&id, result))
        }
        Err(failure) => Some(encode(&Value::Null, Err(failure))),
    }
}

/// The reply to a line that does not end.
pub(super) fn too_long(most: usize) -> Vec<u8> {
    let why = format!("a request has at most {most} bytes, and ends with a line feed");
    encode(&Value::Null, Err(Failure::new(Failure::INVALID_REQUEST, why)))
}

/// A request, as a line.
pub(super) fn request(id: u64, method: &str, params: &Value) -> Vec<u8> {
    line(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }))
}

fn decode(line: &[u8]) -> Result<Request, Failure> {
    let value: Value = serde_json::from_slice(line).map_err(|error| Failure::new(Failure::PARSE, error))?;
    let invalid = |why: &dyn ToString| Failure::new(Failure::INVALID_REQUEST, why.to_string());
    if value.is_array() {
        return Err(invalid(&"batches are not served; send one request a line"));
    }
    let request: Request = serde_json::from_value(value).map_err(|error| invalid(&error))?;
    if request.jsonrpc != "2.0" {
        return Err(invalid(&"jsonrpc must be \"2.0\""));
    }
    if !request.id.as_ref().is_none_or(|id| id.is_string() || id.is_number()) {
        return Err(invalid(&"id must be a string or a number"));
    }
    Ok(request)
}

fn encode(id: &Value, result: Result<Value, Failure>) -> Vec<u8> {
    line(&match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err(failure) => json!({ "jsonrpc": "2.0", "id": id, "error": failure }),
    })
}

fn line(value: &Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(line: &str) -> Option<Value> {
        let reply = answer(line.as_bytes(), |method, params| match method {
            "echo" => Ok(params),
            _ => Err(Failure::no_method(method, &["echo"])),
        })?;
        assert_eq!(reply.iter().position(|byte| *byte == b'\n'), Some(reply.len() - 1), "one line");
        Some(serde_json::from_slice(&reply).unwrap())
    }

    #[test]
    fn each_request_has_its_reply() {
        let reply = ask(r#"{"jsonrpc":"2.0","id":"a","method":"echo","params":{"line\n":1}}"#).unwrap();
        assert_eq!(reply, json!({ "jsonrpc": "2.0", "id": "a", "result": { "line\n": 1 } }));
        assert_eq!(ask(r#"{"jsonrpc":"2.0","method":"echo"}"#), None, "a notification");
        assert_eq!(ask(" \r"), None);
        let mine = request(7, "echo", &json!([1]));
        let reply: Reply = serde_json::from_value(ask(std::str::from_utf8(&mine).unwrap()).unwrap()).unwrap();
        assert_eq!(reply, Reply { id: 7.into(), result: Some(json!([1])), error: None });
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (line, code, words) in [
            ("{", -32700, "EOF"),
            ("\u{0}", -32700, "expected"),
            ("[]", -32600, "batches"),
            ("3", -32600, "invalid type"),
            (r#"{"jsonrpc":"1.0","id":1,"method":"echo"}"#, -32600, "2.0"),
            (r#"{"id":1,"method":"echo"}"#, -32600, "jsonrpc"),
            (r#"{"jsonrpc":"2.0","id":1}"#, -32600, "method"),
            (r#"{"jsonrpc":"2.0","id":[],"method":"echo"}"#, -32600, "id"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"echo","parms":1}"#, -32600, "parms"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"exec"}"#, -32601, "echo"),
        ] {
            let reply = ask(line).unwrap();
            assert_eq!(reply["error"]["code"], code, "{line} gave {reply}");
            assert!(reply["error"]["message"].as_str().unwrap().contains(words), "{line} gave {reply}");
        }
        // As deep as it likes: no recursion without an end.
        assert_eq!(ask(&"[".repeat(60_000)).unwrap()["error"]["code"], -32700);
    }
}
