//! What a PromQL expression asks for. Whether it is PromQL at all is promtool's to say.

use std::collections::BTreeSet;

/// The series that an expression selects, and the labels that it groups or joins them by.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub selectors: Vec<Selector>,
    pub grouping: BTreeSet<String>,
}

/// `metric{label="…", …}`.
#[derive(Debug, PartialEq, Eq)]
pub struct Selector {
    pub metric: String,
    pub labels: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Name(String),
    Text(String),
    Number,
    Mark(char),
}

/// Words that are followed by labels in parentheses, or by nothing.
const GROUPING: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Words that are no metric. Functions and aggregations are told by what follows them.
const WORDS: [&str; 8] = ["and", "or", "unless", "atan2", "bool", "offset", "inf", "nan"];

/// Reads a whole expression, or says what it cannot read.
pub fn query(expression: &str) -> Result<Query, String> {
    let tokens = tokens(expression)?;
    let mut rest = &tokens[..];
    let mut query = Query::default();
    while let [first, after @ ..] = rest {
        rest = after;
        match first {
            Token::Name(name) if GROUPING.contains(&name.as_str()) => {
                if let [Token::Mark('('), ..] = rest {
                    let (labels, after) = names_until(&rest[1..], ')')?;
                    query.grouping.extend(labels);
                    rest = after;
                }
            }
            Token::Name(name) if WORDS.contains(&name.to_lowercase().as_str()) => {}
            Token::Name(name) => match rest {
                [Token::Mark('('), ..] => {}
                [Token::Name(next), ..] if GROUPING[..2].contains(&next.as_str()) => {}
                [Token::Mark('{'), after @ ..] => {
                    let (labels, after) = matchers(after)?;
                    query.selectors.push(Selector { metric: name.clone(), labels });
                    rest = after;
                }
                _ => query.selectors.push(Selector { metric: name.clone(), labels: Vec::new() }),
            },
            Token::Mark('{') => return Err(format!("a selector without a metric's name: {expression}")),
            // A range or a subquery: durations and variables.
            Token::Mark('[') => {
                let end = rest.iter().position(|token| *token == Token::Mark(']'));
                rest = &rest[end.ok_or_else(|| format!("[ without ]: {expression}"))? + 1..];
            }
            Token::Text(_) | Token::Number | Token::Mark(_) => {}
        }
    }
    Ok(query)
}

/// The labels of `label="…", label=~"…"}`, and what comes after.
fn matchers(tokens: &[Token]) -> Result<(Vec<String>, &[Token]), String> {
    let end = tokens.iter().position(|token| *token == Token::Mark('}')).ok_or("{ without }")?;
    let labels = tokens[..end].iter().filter_map(|token| match token {
        Token::Name(name) => Some(name.clone()),
        _ => None,
    });
    Ok((labels.collect(), &tokens[end + 1..]))
}

/// `a, b)` and what comes after.
fn names_until(tokens: &[Token], end: char) -> Result<(Vec<String>, &[Token]), String> {
    let mut names = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Name(name) => names.push(name.clone()),
            Token::Mark(',') => {}
            Token::Mark(mark) if *mark == end => return Ok((names, &tokens[at + 1..])),
            other => return Err(format!("{other:?} among labels")),
        }
    }
    Err(format!("no {end} after labels"))
}

fn tokens(expression: &str) -> Result<Vec<Token>, String> {
    let starts_name = |c: char| c.is_ascii_alphabetic() || matches!(c, '_' | ':');
    let in_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    let mut tokens = Vec::new();
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            c if c.is_whitespace() => c.len_utf8(),
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '"' | '\'' | '`' => {
                let length =
                    text_length(rest, first).ok_or_else(|| format!("a text does not end: {rest}"))?;
                tokens.push(Token::Text(rest[1..length - 1].into()));
                length
            }
            // 5m, 1e3, 0.55, and Grafana's $variable
            c if c.is_ascii_digit() || c == '.' || c == '$' => {
                let number = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '$');
                tokens.push(Token::Number);
                rest.find(|c| !number(c)).unwrap_or(rest.len())
            }
            c if starts_name(c) => {
                let length = rest.find(|c| !in_name(c)).unwrap_or(rest.len());
                tokens.push(Token::Name(rest[..length].into()));
                length
            }
            c => {
                tokens.push(Token::Mark(c));
                c.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    Ok(tokens)
}

/// The length of the text that `rest` begins with, its quotes included.
fn text_length(rest: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' if quote != '`' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}
