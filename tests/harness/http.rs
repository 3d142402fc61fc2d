//! HTTP as the tests speak it.

use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;

use serde_json::Value;

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

/// GET: the status and the text.
pub fn get(url: &str) -> Result<(u16, String), String> {
    got(url, agent().get(url))
}

/// GET with one parameter, whatever characters it has.
pub fn get_about(url: &str, name: &str, value: &str) -> Result<(u16, String), String> {
    got(url, agent().get(url).query(name, value))
}

fn got(
    url: &str,
    request: ureq::RequestBuilder<ureq::typestate::WithoutBody>,
) -> Result<(u16, String), String> {
    let mut response = request.call().map_err(|error| format!("{url}: {error}"))?;
    let text = response.body_mut().read_to_string().map_err(|error| format!("{url}: {error}"))?;
    Ok((response.status().as_u16(), text))
}

/// POST of JSON: the status and the JSON.
pub fn post(url: &str, body: &Value) -> Result<(u16, Value), String> {
    post_with(url, &[], body)
}

/// The same with more headers.
pub fn post_with(url: &str, headers: &[(&str, &str)], body: &Value) -> Result<(u16, Value), String> {
    let request =
        headers.iter().fold(agent().post(url), |request, (name, value)| request.header(*name, *value));
    let mut response = request.send_json(body).map_err(|error| format!("{url}: {error}"))?;
    let json = response.body_mut().read_json().map_err(|error| format!("{url}: {error}"))?;
    Ok((response.status().as_u16(), json))
}

/// POST of JSON: the status, one of the answer's headers, and the text.
pub fn post_for(url: &str, header: &str, body: &Value) -> Result<(u16, Option<String>, String), String> {
    let mut response = agent().post(url).send_json(body).map_err(|error| format!("{url}: {error}"))?;
    let value = response.headers().get(header).and_then(|value| value.to_str().ok()).map(str::to_string);
    let text = response.body_mut().read_to_string().map_err(|error| format!("{url}: {error}"))?;
    Ok((response.status().as_u16(), value, text))
}

/// POST that streams: every server-sent event's JSON, as it comes, until `[DONE]`, or until `event` hangs up.
pub fn stream(url: &str, body: &Value, event: impl FnMut(Value) -> ControlFlow<()>) -> Result<(), String> {
    stream_after(url, &mut None, body, event)
}

/// The same after an event of which the client has the id, which is then that of the last that came.
pub fn stream_after(
    url: &str,
    last: &mut Option<String>,
    body: &Value,
    mut event: impl FnMut(Value) -> ControlFlow<()>,
) -> Result<(), String> {
    let mut request = agent().post(url);
    if let Some(last) = last {
        request = request.header("last-event-id", &*last);
    }
    let response = request.send_json(body).map_err(|error| format!("{url}: {error}"))?;
    let status = response.status().as_u16();
    let reader = BufReader::new(response.into_body().into_reader());
    let (mut data, mut id) = (None, None);
    for line in reader.lines() {
        let line = line.map_err(|error| format!("the stream broke: {error}"))?;
        if status != 200 {
            return Err(format!("{status}: {line}"));
        }
        match line.split_once(": ") {
            Some(("data", value)) => data = Some(value.to_string()),
            Some(("id", value)) => id = Some(value.to_string()),
            // An event is whole at an empty line.
            None if line.is_empty() => {
                let Some(data) = data.take() else { continue };
                if data == "[DONE]" {
                    return Ok(());
                }
                let json = serde_json::from_str(&data).map_err(|error| format!("{data}: {error}"))?;
                *last = id.take().or(last.take());
                if let ControlFlow::Break(()) = event(json) {
                    return Ok(());
                }
            }
            Some(_) | None => {}
        }
    }
    Err("the stream ended without [DONE]".into())
}
