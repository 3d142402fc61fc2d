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
    use super::*;

    #[test]
    fn the_definition_in_deploy_is_the_one_that_the_code_makes() {
        let written = include_str!("../../../deploy/crds/modeldeployments.yaml");
        assert_eq!(yaml().unwrap(), written, "run `make generated`");
        assert!(written.len() < 256 * 1024, "a CustomResourceDefinition must stay below 256 KiB");
    }
}
