//! HTTP, as far as a scrape needs it: one request, one response, and the connection ends.

use httparse::{EMPTY_HEADER, Header, Request, Status};

use super::connection::{Answer, Answered, MAX_REQUEST};
use super::exposition::Form;

/// Headers of a request, at most.
const MAX_HEADERS: usize = 32;
const TEXT: &str = "text/plain; charset=utf-8";

/// The response to what has come so far; `None` if more is to come.
pub(super) fn answer(input: &[u8], counters: impl FnOnce(Form) -> String) -> Answered {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut request = Request::new(&mut headers);
    let response = match request.parse(input) {
        Ok(Status::Partial) if input.len() < MAX_REQUEST => return None,
        Ok(Status::Partial) => {
            response("431 Request Header Fields Too Large", TEXT, "the request is too long\n")
        }
        Err(error) => response("400 Bad Request", TEXT, &format!("this is no HTTP: {error}\n")),
        Ok(Status::Complete(_)) => {
            let path = request.path.unwrap_or_default();
            match (request.method, path.split('?').next()) {
                (Some("GET"), Some("/metrics")) => {
                    let form = wanted(request.headers);
                    response("200 OK", form.media_type(), &counters(form))
                }
                (Some("GET"), _) => response("404 Not Found", TEXT, "the counters are at /metrics\n"),
                _ => response("405 Method Not Allowed", TEXT, "only GET is served\n"),
            }
        }
    };
    Some((input.len(), Answer { bytes: response, is_last: true }))
}

/// The form that the reader knows.
fn wanted(headers: &[Header<'_>]) -> Form {
    let accepted = headers.iter().filter(|header| header.name.eq_ignore_ascii_case("accept"));
    let is_known =
        |header: &Header<'_>| String::from_utf8_lossy(header.value).contains("application/openmetrics-text");
    if accepted.into_iter().any(is_known) { Form::OpenMetrics } else { Form::Prometheus }
}

fn response(status: &str, kind: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(input: &[u8]) -> Option<String> {
        let (used, answer) = answer(input, |form| format!("{form:?}\n"))?;
        assert!(used == input.len() && answer.is_last);
        let text = String::from_utf8(answer.bytes).unwrap();
        Some(text.split_whitespace().nth(1).unwrap().to_owned())
    }

    #[test]
    fn a_scrape_gets_the_counters_and_others_an_error() {
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap(), "200");
        assert_eq!(status(b"GET /metrics?x=1 HTTP/1.0\r\n\r\n").unwrap(), "200");
        assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n").unwrap(), "404");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n").unwrap(), "405");
        assert_eq!(status(b"\0\0\0\0").unwrap(), "400");
        let many: String = (0..40).map(|number| format!("H{number}: x\r\n")).collect();
        assert_eq!(status(format!("GET /metrics HTTP/1.1\r\n{many}\r\n").as_bytes()).unwrap(), "400");
    }

    #[test]
    fn who_knows_openmetrics_gets_it() {
        let body = |accept: &str| {
            let request = format!("GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n");
            let (_, answer) = answer(request.as_bytes(), |form| format!("{form:?}")).unwrap();
            String::from_utf8(answer.bytes).unwrap().rsplit("\r\n").next().unwrap().to_owned()
        };
        assert_eq!(body("application/openmetrics-text;version=1.0.0,text/plain;q=0.5"), "OpenMetrics");
        assert_eq!(body("*/*"), "Prometheus");
    }

    #[test]
    fn a_request_may_come_in_pieces_and_not_be_too_long() {
        let whole = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        for length in 0..whole.len() {
            assert_eq!(status(&whole[..length]), None, "{length}");
        }
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(MAX_REQUEST));
        assert_eq!(status(&long.as_bytes()[..MAX_REQUEST]).unwrap(), "431");
    }
}
