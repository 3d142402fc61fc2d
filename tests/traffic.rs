//! `expertmesh load` and `expertmesh simulate`, which are another program's: reachable, explained and refused as if they were not.

use std::process::{Command, Output};

use expertmesh_tests::process::binary;
use expertmesh_tests::root;
use serde_json::Value;

fn expertmesh(arguments: &[&str]) -> Output {
    binary("expertmesh-traffic"); // names what is missing
    Command::new(binary("expertmesh")).args(arguments).current_dir(root()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_string()
}

#[test]
fn the_list_of_commands_and_their_own_help_have_the_same_words() {
    let list = text(&expertmesh(&["--help"]).stdout);
    for command in ["load", "simulate"] {
        let help = text(&expertmesh(&[command, "--help"]).stdout);
        let (about, rest) = help.split_once('\n').unwrap();
        assert!(
            list.lines()
                .any(|line| line.split_whitespace().eq([command].into_iter().chain(about.split(' ')))),
            "{about}\n{list}"
        );
        assert!(rest.contains(&format!("Usage: expertmesh {command} ")), "{help}");
        assert_eq!(help, text(&expertmesh(&["help", command]).stdout));
    }
}

#[test]
fn a_deployment_is_refused_with_the_words_of_expertmesh() {
    let refused = |file: &str| {
        let output = expertmesh(&["simulate", "--deployment", file]);
        assert_eq!(output.status.code(), Some(1));
        text(&output.stderr)
    };
    let file = "deploy/samples/tiny-r1.yaml";
    assert_eq!(refused(file), format!("expertmesh: {file}: spec.autoscaling: missing; it has the goals"));
    assert_eq!(refused("no.yaml"), "expertmesh: no.yaml: no such file");
}

#[test]
fn an_hour_is_simulated_with_what_a_deployment_says() {
    let deployment = "deploy/samples/bench-autoscaled.yaml";
    let output = expertmesh(&["simulate", "--deployment", deployment, "--pattern", "burst", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table: Value = serde_json::from_slice(&output.stdout).unwrap();
    let manifest = std::fs::read_to_string(root().join(deployment)).unwrap();
    let manifest: Value = serde_yaml::from_str(&manifest).unwrap();
    let goal = manifest["spec"]["autoscaling"]["tpot"].as_str().unwrap();
    assert_eq!(format!("{}ms", 1e3 * table["goals"]["tpot"].as_f64().unwrap()), goal);
    assert!(table["policies"].as_array().is_some_and(|rows| rows.len() >= 3), "{table}");
}
