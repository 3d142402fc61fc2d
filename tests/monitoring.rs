//! The dashboards and alerts that ship: they ask for what is exported, promtool takes them, each alert says what to do, and the chart
//! brings them as they are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use expertmesh_tests::dashboards::{self, Dashboard};
use expertmesh_tests::kubernetes::{Namespace, condition, run};
use expertmesh_tests::openai::Load;
use expertmesh_tests::process::{Process, Scratch};
use expertmesh_tests::prometheus;
use expertmesh_tests::promql::{self, Selector};
use expertmesh_tests::reference::Question;
use expertmesh_tests::{root, skipped, wait_for};
use serde_json::{Value, json};

/// What deploy/prometheus.yaml and the chart's PodMonitor give every series.
const TARGET_LABELS: [&str; 6] = ["namespace", "name", "component", "pod", "instance", "job"];
const RUNBOOKS: &str = "https://github.com/expertmesh/expertmesh/blob/main/docs/runbooks/";

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml(path: &str) -> Value {
    serde_yaml::from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The rules of all groups.
fn rules() -> Vec<Value> {
    let file = yaml("deploy/alerts/expertmesh.yaml");
    list(&file["groups"]).iter().flat_map(|group| list(&group["rules"])).cloned().collect()
}

fn alerts() -> Vec<Value> {
    rules().into_iter().filter(|rule| !rule["alert"].is_null()).collect()
}

/// Where a query is written, and the query.
fn queries() -> Vec<(String, String)> {
    let of_dashboards = dashboards::all().into_iter().flat_map(|dashboard| {
        let of_panels =
            dashboard.queries().into_iter().map(|query| (query.place.clone(), query.of("a", "m")));
        let of_variables: Vec<_> = dashboard.variables().iter().filter_map(variable_query).collect();
        of_panels.chain(of_variables).collect::<Vec<_>>()
    });
    let of_rules = rules().into_iter().map(|rule| {
        let name = [text(&rule, "alert"), text(&rule, "record")].concat();
        (name, text(&rule, "expr").to_string())
    });
    let of_runbooks = alerts_by_name().into_keys().flat_map(|name| {
        let page = read(&format!("docs/runbooks/{name}.md"));
        let blocks =
            page.split("```promql\n").skip(1).map(|block| block.split("```").next().unwrap_or_default());
        // Blocks hold a query a line, of an example.
        let lines = blocks.flat_map(str::lines).map(str::trim).filter(|line| !line.is_empty());
        lines.map(|line| (format!("{name}.md"), line.to_string())).collect::<Vec<_>>()
    });
    of_dashboards.chain(of_rules).chain(of_runbooks).collect()
}

/// `label_values(SELECTOR, label)` as the expression that it lists the label of.
fn variable_query(variable: &Value) -> Option<(String, String)> {
    let query = variable["query"]["query"].as_str()?;
    let (selector, label) = query.strip_prefix("label_values(")?.strip_suffix(')')?.rsplit_once(", ")?;
    let selector = selector.replace("$namespace", "a");
    Some((format!("variable {}", variable["name"]), format!("count by ({label}) ({selector})")))
}

fn alerts_by_name() -> BTreeMap<String, Vec<Value>> {
    let mut by_name: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for alert in alerts() {
        by_name.entry(text(&alert, "alert").to_string()).or_default().push(alert);
    }
    by_name
}

#[test]
fn dashboards_and_alerts_ask_for_nothing_that_is_not_exported_or_recorded() {
    let mut known = exported();
    for rule in rules() {
        if let Some(name) = rule["record"].as_str() {
            let labels = promql::query(text(&rule, "expr")).unwrap().grouping;
            known.insert(name.to_string(), labels);
        }
    }
    let mut unknown = Vec::new();
    for (place, expression) in queries() {
        let query = promql::query(&expression).unwrap_or_else(|problem| panic!("{place}: {problem}"));
        let mut labels: BTreeSet<String> = TARGET_LABELS.map(str::to_string).into();
        for Selector { metric, labels: asked } in query.selectors {
            let Some(own) = known.get(&metric) else {
                // What Prometheus makes itself.
                if !["up", "ALERTS"].contains(&metric.as_str()) {
                    unknown.push(format!("{place}: {metric}"));
                }
                continue;
            };
            let strange = |label: &&String| !own.contains(*label) && !TARGET_LABELS.contains(&label.as_str());
            unknown.extend(asked.iter().filter(strange).map(|label| format!("{place}: {label} of {metric}")));
            labels.extend(own.iter().cloned());
        }
        let strange = query.grouping.difference(&labels);
        unknown.extend(strange.map(|label| format!("{place}: {label} in {expression}")));
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
}

/// Every series that workers, frontends and the operator export, and its labels: docs/metrics.md is made of their declarations.
fn exported() -> BTreeMap<String, BTreeSet<String>> {
    let mut exported = BTreeMap::new();
    for row in read("docs/metrics.md").lines().filter(|line| line.starts_with("| `")) {
        let columns: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, name, kind, labels, ..] = columns[..] else { panic!("a row without columns: {row}") };
        let name = name.trim_matches('`');
        let labels = labels.split(", ").map(|label| label.trim_matches('`').to_string());
        let labels: BTreeSet<String> = labels.filter(|label| !label.is_empty()).collect();
        if kind == "histogram" {
            exported.insert(format!("{name}_sum"), labels.clone());
            exported.insert(format!("{name}_count"), labels.clone());
            let with_bound = labels.into_iter().chain(["le".to_string()]).collect();
            exported.insert(format!("{name}_bucket"), with_bound);
        } else {
            exported.insert(name.to_string(), labels);
        }
    }
    exported
}

#[test]
fn a_query_is_read_for_its_metrics_and_labels() {
    let names = |expression: &str| -> Vec<String> {
        promql::query(expression).unwrap().selectors.into_iter().map(|selector| selector.metric).collect()
    };
    assert_eq!(names("sum by (le, pod) (rate(a_bucket{x=\"}\", y=~'b{'}[5m]))"), ["a_bucket"]);
    assert_eq!(names("sum(a) by (pod) / on (pod) group_left (c) max without (d) (vllm:e)"), ["a", "vllm:e"]);
    assert_eq!(names("a offset 5m > bool 1e3 and b[$__rate_interval:1m] @ 7 or vector(0)"), ["a", "b"]);
    assert_eq!(names("label_replace(a, \"b\", \"$1 \\\" c\", \"d\", `e`) # f"), ["a"]);
    assert_eq!(names("absent(a == 1) unless a:b:rate5m"), ["a", "a:b:rate5m"]);
    let query = promql::query("sum by (pod) (a{code=~\"5..\", name!=\"\"}) * on (x) b").unwrap();
    assert_eq!(query.selectors[0].labels, ["code", "name"]);
    assert_eq!(query.grouping, ["pod", "x"].map(str::to_string).into());
    for wrong in ["a{b=\"c", "a[5m", "{job=\"a\"}", "sum by (a"] {
        assert!(promql::query(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn dashboards_are_such_as_grafana_shows() {
    let dashboards = dashboards::all();
    assert_eq!(
        dashboards.iter().map(|dashboard| dashboard.file.as_str()).collect::<Vec<_>>(),
        ["mesh.json", "models.json"]
    );
    let uids: BTreeSet<&str> = dashboards.iter().map(|dashboard| text(&dashboard.json, "uid")).collect();
    assert_eq!(uids.len(), dashboards.len());
    for dashboard in &dashboards {
        assert!(dashboard.json["schemaVersion"].as_u64() >= Some(39), "{}", dashboard.file);
        assert!(text(&dashboard.json, "title").starts_with("ExpertMesh: "), "{}", dashboard.file);
        let names: Vec<&str> = dashboard.variables().iter().map(|variable| text(variable, "name")).collect();
        assert_eq!(names, ["datasource", "namespace", "name"], "{}", dashboard.file);
        let ids: BTreeSet<u64> = dashboard.panels().iter().filter_map(|panel| panel["id"].as_u64()).collect();
        assert_eq!(ids.len(), dashboard.panels().len(), "{}: ids are not unique", dashboard.file);
        assert_eq!(dashboard.panels()[0]["type"], "row", "{}", dashboard.file);
        no_panel_lies_on_another(dashboard);
        for panel in dashboard.panels().iter().filter(|panel| panel["type"] != "row") {
            let place = format!("{}: {}", dashboard.file, panel["title"]);
            assert!(["stat", "timeseries", "state-timeline"].contains(&text(panel, "type")), "{place}");
            assert!(!text(panel, "title").is_empty() && !text(panel, "description").is_empty(), "{place}");
            assert!(!text(&panel["fieldConfig"]["defaults"], "unit").is_empty(), "{place} has no unit");
            let sources = list(&panel["targets"]).iter().chain([panel]);
            let source = json!({"type": "prometheus", "uid": "${datasource}"});
            assert!(sources.into_iter().all(|one| one["datasource"] == source), "{place} has another source");
            let targets = list(&panel["targets"]);
            let references: BTreeSet<&str> = targets.iter().map(|target| text(target, "refId")).collect();
            assert!(!targets.is_empty() && references.len() == targets.len(), "{place}");
            for target in targets {
                assert!(!text(target, "legendFormat").is_empty(), "{place}: a series has no name");
                let left = text(target, "expr").replace("$__rate_interval", "").replace("$namespace", "");
                assert!(!left.replace("$name", "").contains('$'), "{place}: an unknown variable");
            }
        }
    }
}

fn no_panel_lies_on_another(dashboard: &Dashboard) {
    let mut taken = BTreeSet::new();
    for panel in dashboard.panels() {
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap_or_else(|| panic!("{key}: {panel}"));
        assert!(at("x") + at("w") <= 24, "{}", panel["title"]);
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(taken.insert((x, y)), "{}: {} lies on another", dashboard.file, panel["title"]);
            }
        }
    }
}

#[test]
fn every_alert_says_how_grave_it_is_what_it_means_and_what_to_do_and_has_a_case() {
    let by_name = alerts_by_name();
    for (name, alerts) in &by_name {
        assert!(name.starts_with("ExpertMesh"), "{name}");
        for alert in alerts {
            assert!(["critical", "warning"].contains(&text(&alert["labels"], "severity")), "{name}");
            let looks_back = text(alert, "expr").contains("increase(");
            assert!(looks_back || !text(alert, "for").is_empty(), "{name} fires at a single sample");
            let annotations = &alert["annotations"];
            assert!(!text(annotations, "summary").is_empty(), "{name}");
            assert!(text(annotations, "description").ends_with('.'), "{name}");
            assert_eq!(text(annotations, "runbook_url"), format!("{RUNBOOKS}{name}.md"));
        }
        let page = read(&format!("docs/runbooks/{name}.md"));
        assert!(page.starts_with(&format!("# {name}\n")), "{name}'s page has another title");
        for part in ["## What it means", "## How to look", "## Causes, and what to do", "## How it clears"] {
            assert!(page.contains(&format!("\n{part}\n")), "{name}.md lacks {part:?}");
        }
    }
    let pages = std::fs::read_dir(root().join("docs/runbooks")).unwrap();
    for page in pages.map(|page| page.unwrap().file_name().into_string().unwrap()) {
        let alert = page.strip_suffix(".md").unwrap_or_default();
        assert!(by_name.contains_key(alert), "{page} is of no alert");
    }
    for name in by_name.keys() {
        assert!(
            has_a_case(name),
            "no case of deploy/alerts/tests says when {name} fires, is silent before, and clears"
        );
    }
}

/// A case in which the alert is silent, fires, and is silent again.
fn has_a_case(name: &str) -> bool {
    let cases = case_files().into_iter().map(|file| yaml(&file));
    let tests = cases.flat_map(|file| list(&file["tests"]).to_vec());
    tests.into_iter().any(|test| {
        let of_alert = list(&test["alert_rule_test"]).iter().filter(|case| case["alertname"] == name);
        let mut fires: Vec<bool> = of_alert.map(|case| !list(&case["exp_alerts"]).is_empty()).collect();
        fires.dedup();
        fires.ends_with(&[false, true, false])
    })
}

fn case_files() -> Vec<String> {
    let files = std::fs::read_dir(root().join("deploy/alerts/tests")).unwrap();
    let name = |file: std::io::Result<std::fs::DirEntry>| file.unwrap().file_name().into_string().unwrap();
    let mut files: Vec<String> = files.map(|file| format!("deploy/alerts/tests/{}", name(file))).collect();
    files.sort();
    files
}

#[test]
fn promtool_takes_every_rule_and_query_and_every_case_holds() {
    if skipped("promtool") {
        return;
    }
    promtool(&["check", "rules", "deploy/alerts/expertmesh.yaml"]);
    let cases = case_files();
    promtool(&[&["test", "rules"][..], &cases.iter().map(String::as_str).collect::<Vec<_>>()].concat());

    let scratch = Scratch::new("monitoring");
    let rule = |(at, (_, expression)): (usize, (String, String))| json!({"record": format!("query:{at}"), "expr": expression});
    let every: Vec<Value> = queries().into_iter().enumerate().map(rule).collect();
    let file = scratch.path().join("queries.yaml");
    std::fs::write(&file, json!({"groups": [{"name": "queries", "rules": every}]}).to_string()).unwrap();
    promtool(&["check", "rules", "--lint=none", file.to_str().unwrap()]);

    // Debian's promtool knows no pods: they are taken out, and what is made of them is checked.
    let mut configuration = yaml("deploy/prometheus.yaml");
    let alerts = root().join("deploy/alerts/expertmesh.yaml");
    configuration["rule_files"] = json!([alerts]);
    let discovery =
        configuration["scrape_configs"][0].as_object_mut().unwrap().remove("kubernetes_sd_configs");
    assert_eq!(discovery.unwrap()[0]["role"], "pod");
    let file = scratch.path().join("prometheus.yaml");
    std::fs::write(&file, configuration.to_string()).unwrap();
    promtool(&["check", "config", file.to_str().unwrap()]);
}

fn promtool(arguments: &[&str]) {
    run("promtool", arguments, None)
        .unwrap_or_else(|problem| panic!("promtool {}: {problem}", arguments.join(" ")));
}

#[test]
fn the_chart_brings_the_same_labels_alerts_and_dashboards_where_values_ask_for_them() {
    if skipped("kubernetes") {
        return;
    }
    let all = [
        "monitoring.podMonitor.enabled=true",
        "monitoring.prometheusRule.enabled=true",
        "monitoring.dashboards.enabled=true",
        "monitoring.scrapeAnnotations=true",
    ];
    let set = all.join(",");
    run("helm", &["lint", "--strict", "--quiet", "charts/expertmesh", "--set", &set], None).unwrap();
    let plain = rendered(&[]);
    assert!(plain.iter().all(|object| !["PodMonitor", "PrometheusRule"].contains(&text(object, "kind"))));
    assert!(plain.iter().all(|object| object["kind"] != "ConfigMap"));
    let objects = rendered(&["--set", &set]);
    let of_kind = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).collect::<Vec<_>>();

    let [monitor] = of_kind("PodMonitor")[..] else { panic!("not one PodMonitor") };
    assert_eq!(monitor["spec"]["namespaceSelector"], json!({"any": true}));
    assert_eq!(
        monitor["spec"]["selector"]["matchLabels"],
        json!({"app.kubernetes.io/part-of": "expertmesh"})
    );
    let [endpoint] = list(&monitor["spec"]["podMetricsEndpoints"]) else { panic!("not one endpoint") };
    assert_eq!(endpoint["port"], "metrics");
    let scraped = &yaml("deploy/prometheus.yaml")["scrape_configs"][0];
    assert_eq!(endpoint["honorLabels"], scraped["honor_labels"]);
    // The operator itself adds what comes before `component`: the port, the phase, namespace and pod.
    let ours = list(&scraped["relabel_configs"]).iter();
    let ours = ours.skip_while(|rule| rule["target_label"] != "component");
    let ours: Vec<Value> = ours.map(in_camel_case).collect();
    assert_eq!(list(&endpoint["relabelings"]), ours);

    let [rule] = of_kind("PrometheusRule")[..] else { panic!("not one PrometheusRule") };
    assert_eq!(rule["spec"], yaml("deploy/alerts/expertmesh.yaml"));

    let maps = of_kind("ConfigMap");
    let mut shown = 0;
    for dashboard in dashboards::all() {
        for map in &maps {
            assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
            let data = map["data"].as_object().unwrap();
            let Some(text) = data.get(&format!("expertmesh-{}", dashboard.file)) else { continue };
            let json: Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
            assert_eq!(json, dashboard.json);
            shown += 1;
        }
    }
    assert_eq!(shown, 2);

    let [operator] = of_kind("Deployment")[..] else { panic!("not one Deployment") };
    let annotations = &operator["spec"]["template"]["metadata"]["annotations"];
    let expected = json!({"prometheus.io/scrape": "true", "prometheus.io/port": "9090", "prometheus.io/path": "/metrics"});
    assert_eq!(*annotations, expected);
}

#[test]
fn every_query_of_the_dashboards_has_an_answer_while_a_model_serves() {
    if skipped("kubernetes") || skipped("prometheus") {
        return;
    }
    let namespace = Namespace::new("watched");
    let deployment = namespace.deploy("tiny", |spec| {
        spec["autoscaling"] = json!({"minWorkers": 2, "maxWorkers": 4, "ttft": "5s", "tpot": "500ms"});
    });
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    let mut wrong = Question::greedy("No answer at all.");
    wrong.length = Some(0);
    reached.api.check_refused(&wrong, 400);
    wait_for("every query to be answered", || {
        load.go_on_for(1);
        let silent = dashboards::silent(&namespace.name, "tiny")?;
        if silent.is_empty() { Ok(()) } else { Err(format!("{silent:#?}")) }
    });
    load.end();
}

#[test]
fn a_frozen_worker_is_told_by_a_condition_a_metric_and_an_alert() {
    if skipped("kubernetes") || skipped("prometheus") {
        return;
    }
    let namespace = Namespace::new("frozen");
    let deployment = namespace.deploy("frozen", |spec| spec["workers"]["replicas"] = json!(3));
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 3);
    let silences = format!("expertmesh_frontend_worker_silences_total{{namespace=\"{}\"}}", namespace.name);
    wait_for("the counter of silences to be scraped", || match prometheus::query(&silences)?.len() {
        0 => Err("not yet".into()),
        _ => Ok(()),
    });
    let frozen = namespace.pods("worker").remove(1).name;
    let processes =
        run("pgrep", &["--full", &format!("^expertmesh-worker serve --name {frozen} ")], None).unwrap();
    let process: u32 = processes.trim().parse().expect("one process of that name");
    let since = Instant::now();
    Process::signal_to(process, "STOP");
    let told = |what: &str| println!("{what} after {} ms", since.elapsed().as_millis());
    let frontend = namespace.pods("frontend").remove(0).name;
    wait_for("a frontend to count the silence", || {
        let metrics = namespace.metrics(&frontend)?;
        let counted = |line: &str| {
            line.starts_with("expertmesh_frontend_worker_silences_total") && !line.ends_with(" 0")
        };
        if metrics.lines().any(counted) { Ok(()) } else { Err(metrics) }
    });
    told("the metric");
    wait_for("a condition that names the worker", || {
        let available = condition(&deployment.status(), "WorkersAvailable");
        let message = text(&available, "message");
        let named =
            text(&available, "status") == "False" && message.contains("worker 1: it has fallen silent");
        if named { Ok(()) } else { Err(available.to_string()) }
    });
    told("the condition");
    let alert = format!(
        "ALERTS{{alertname=\"ExpertMeshWorkerSilent\",alertstate=\"firing\",namespace=\"{}\"}}",
        namespace.name
    );
    wait_for("the alert", || match prometheus::query(&alert)?.len() {
        0 => Err("it does not fire".into()),
        _ => Ok(()),
    });
    told("the alert, scraped and evaluated every two seconds,");
    Process::signal_to(process, "CONT");
    deployment.wait_until_sized(3);
    load.go_on_for(1);
    load.end();
}

fn in_camel_case(rule: &Value) -> Value {
    let renamed = |(key, value): (&String, &Value)| {
        let mut words = key.split('_');
        let first = words.next().unwrap_or_default().to_string();
        let key = words.fold(first, |name, word| name + &word[..1].to_uppercase() + &word[1..]);
        (key, value.clone())
    };
    Value::Object(rule.as_object().unwrap().iter().map(renamed).collect())
}

/// The objects that the chart makes.
fn rendered(arguments: &[&str]) -> Vec<Value> {
    let helm =
        [&["template", "expertmesh", "charts/expertmesh", "--namespace", "expertmesh-system"], arguments]
            .concat();
    let text = run("helm", &helm, None).unwrap();
    let objects = text.split("\n---\n").map(|object| serde_yaml::from_str(object).unwrap());
    objects.filter(|object: &Value| !object.is_null()).collect()
}
