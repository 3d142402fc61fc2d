//! Which pages of browsers may call this API.

use std::time::Duration;

use axum::http::{HeaderValue, header};
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use super::request_id::REQUEST_ID;
use super::seed::SEED;
use crate::process::Fatal;

/// How long browsers may remember what they were allowed.
const MAX_AGE: Duration = Duration::from_secs(3600);

/// The headers for browsers: any page may call where `origins` is `*`, otherwise those of these origins. Never with
/// credentials that a browser adds by itself.
pub(super) fn layer(origins: &[String]) -> Result<CorsLayer, Fatal> {
    let layer = CorsLayer::new()
        .allow_methods(Any)
        // To browsers `*` does not mean Authorization.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID, SEED, header::RETRY_AFTER])
        .max_age(MAX_AGE);
    if origins.iter().any(|origin| origin == "*") {
        return Ok(layer.allow_origin(Any));
    }
    let parse = |origin: &String| {
        let problem = || format!("--cors-origins: {origin:?} is no origin, as https://app.example is");
        let valid = origin.contains("://") && !origin.ends_with('/');
        let value = HeaderValue::from_str(origin).ok().filter(|_| valid);
        value.ok_or_else(|| Fatal::new("InvalidOrigin", problem()))
    };
    let named = origins.iter().filter(|origin| !origin.is_empty());
    Ok(layer.allow_origin(named.map(parse).collect::<Result<Vec<_>, _>>()?))
}
