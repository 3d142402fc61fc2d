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
pub fn stream(
    url: &str,
    body: &Value,
    mut event: impl FnMut(Value) -> ControlFlow<()>,
) -> Result<(), String> {
    let response = agent().post(url).send_json(body).map_err(|error| format!("{url}: {error}"))?;
    let status = response.status().as_u16();
    let reader = BufReader::new(response.into_body().into_reader());
    for line in reader.lines() {
        let line = line.map_err(|error| format!("the stream broke: {error}"))?;
        match line.strip_prefix("data: ") {
            Some("[DONE]") => return Ok(()),
            Some(data) => {
                let json = serde_json::from_str(data).map_err(|error| format!("{data}: {error}"))?;
                if let ControlFlow::Break(()) = event(json) {
                    return Ok(());
                }
            }
            None if status != 200 => return Err(format!("{status}: {line}")),
            None => {}
        }
    }
    Err("the stream ended without [DONE]".into())
}
