//! JSON in one form, for hashes: keys in order, whatever order they were written or declared in.

use serde_json::Value;

/// Where commas are. Hashes of both forms are in use, and must stay what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commas {
    /// Between elements, as JSON has them.
    Between,
    /// After every element, the last one too.
    After,
}

/// A value as text, without spaces.
pub fn canonical(value: &Value, commas: Commas) -> String {
    match value {
        // serde_json's own order is the file's where another crate switches `preserve_order` on.
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_unstable_by_key(|(key, _)| *key);
            let fields =
                fields.into_iter().map(|(key, value)| format!("{key:?}:{}", canonical(value, commas)));
            format!("{{{}}}", commas.join(fields))
        }
        Value::Array(items) => {
            format!("[{}]", commas.join(items.iter().map(|item| canonical(item, commas))))
        }
        scalar => scalar.to_string(),
    }
}

impl Commas {
    fn join(self, elements: impl Iterator<Item = String>) -> String {
        match self {
            Self::Between => elements.collect::<Vec<_>>().join(","),
            Self::After => elements.map(|element| element + ",").collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_in_order_and_commas_where_they_are_asked_for() {
        let value = json!({"b": [1, "x", {}], "a": {"d": null, "c": true}});
        assert_eq!(canonical(&value, Commas::Between), r#"{"a":{"c":true,"d":null},"b":[1,"x",{}]}"#);
        assert_eq!(canonical(&value, Commas::After), r#"{"a":{"c":true,"d":null,},"b":[1,"x",{},],}"#);
    }
}
