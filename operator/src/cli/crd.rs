//! `expertmesh crd`: the CustomResourceDefinition, as YAML.

use anyhow::Context as _;
use kube::CustomResourceExt;

use crate::api::ModelDeployment;

pub(crate) fn run() -> anyhow::Result<()> {
    print!("{}", yaml()?);
    Ok(())
}

fn yaml() -> anyhow::Result<String> {
    serde_yaml::to_string(&ModelDeployment::crd())
        .context("the CustomResourceDefinition cannot be written as YAML")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn the_definition_in_deploy_is_the_one_that_the_code_makes() {
        let written = include_str!("../../../deploy/crds/modeldeployments.yaml");
        assert_eq!(yaml().unwrap(), written, "run `make generated`");
        assert!(written.len() < 256 * 1024, "a CustomResourceDefinition must stay below 256 KiB");
    }

    #[test]
    fn every_field_has_a_description() {
        let schema: Value = serde_yaml::from_str(&yaml().unwrap()).unwrap();
        let mut without = vec![];
        collect(&schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "", &mut without);
        assert!(without.is_empty(), "{without:#?}");
    }

    /// The paths of fields that have no description, below `schema`, whose own path is given.
    fn collect(schema: &Value, path: &str, without: &mut Vec<String>) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            if field["description"].as_str().unwrap_or_default().is_empty() {
                without.push(path.clone());
            }
            collect(field, &path, without);
        }
        for part in ["items", "additionalProperties"] {
            if !schema[part].is_null() {
                collect(&schema[part], path, without);
            }
        }
    }
}
