use std::collections::BTreeSet;

use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::placement::PlacedWorker;
use expertmesh_proto::slot::Slot;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::Value;

use super::policies::Around;
use super::revision::recorded_as;
use super::*;
use crate::api::ModelDeployment;
use crate::validate::ValidatedDeployment;

fn owner() -> Owner {
    let reference = OwnerReference {
        api_version: "expertmesh.dev/v1alpha1".into(),
        kind: "ModelDeployment".into(),
        name: "tiny-r1".into(),
        uid: "00000000-0000-0000-0000-000000000001".into(),
        controller: Some(true),
        block_owner_deletion: None,
    };
    Owner { namespace: "models".into(), name: "tiny-r1".into(), reference }
}

/// One of another model.
fn of_model(fields: &str) -> ValidatedDeployment {
    let yaml = format!(
        "apiVersion: expertmesh.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: tiny-r1}}\nspec:\n  model: {{{fields}}}\n"
    );
    ValidatedDeployment::new(&serde_yaml::from_str(&yaml).unwrap()).unwrap()
}

/// The smallest deployment, with `more` merged into its spec.
fn deployment(more: &str) -> ValidatedDeployment {
    let yaml = format!(
        "apiVersion: expertmesh.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: tiny-r1}}\nspec:\n  \
         model: {{uri: 'file:///models/tiny-r1'}}\n{more}"
    );
    let object: ModelDeployment = serde_yaml::from_str(&yaml).unwrap();
    ValidatedDeployment::new(&object).unwrap()
}

fn revision(more: &str) -> Revision {
    Revision::new(&owner(), &deployment(more), "expertmesh:1")
}

fn placement() -> Placement {
    let experts = [ExpertId { layer: 1, expert: 0 }].into_iter().collect();
    let addresses = vec!["10.244.1.7:7070".to_string()];
    let worker =
        PlacedWorker { slot: Slot(0), name: "tiny-r1-0-0".into(), addresses, experts, draining: false };
    Placement::new(Epoch { term: 0, counter: 2 }, vec![worker]).unwrap()
}

#[test]
fn the_objects_of_a_deployment() {
    let serving = Serving { revision: "1a2b3c4d", is_encrypted: false, is_dual: true };
    let around = r#"{
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "egress": [{"ports": [{"port": 15012, "protocol": "TCP"}]}]
    }"#;
    let around = around.parse().unwrap();
    let surroundings = Surroundings {
        around: &around,
        operator_namespace: Some("expertmesh-system"),
        collector: Some(4317),
        hubs: [None, Some(443)],
    };
    let objects = shared(&owner(), serving, surroundings);
    insta::assert_yaml_snapshot!("service-account", objects.service_account);
    insta::assert_yaml_snapshot!("workers-service", objects.workers_service);
    insta::assert_yaml_snapshot!("client-service", objects.client_service);
    insta::assert_yaml_snapshot!("disruption-budgets", objects.disruption_budgets);
    insta::assert_yaml_snapshot!("network-policies", objects.network_policies);
}

#[test]
fn the_objects_of_a_revision() {
    let placement = placement();
    let size = Size { workers: 4, frontends: 1, placement: Some(&placement), commit: None };
    let objects = of_revision(&owner(), &revision("  workers: {replicas: 4}\n"), size);
    insta::assert_yaml_snapshot!("stateful-set", objects.workers);
    insta::assert_yaml_snapshot!("deployment", objects.frontends);
    insta::assert_yaml_snapshot!("placement", objects.placement);
    assert_eq!(Revision::recorded(&objects.record), Some(revision("")));
}

#[test]
fn pods_of_a_hubs_model_draw_it_into_a_claim_of_each_worker_at_one_commit() {
    let deployment = of_model(
        "uri: 'hf://a/b', endpoint: 'https://hub.example.com', tokenSecretRef: {name: hub, key: token}, \
         cache: {size: 80Gi, storageClassName: fast}",
    );
    let revision = Revision::new(&owner(), &deployment, "expertmesh:1");
    assert_eq!((revision.model().as_deref(), revision.is_floating()), (Some("hf://a/b"), true));
    let size = Size { workers: 1, frontends: 0, placement: None, commit: Some("c0ffee") };
    let objects = of_revision(&owner(), &revision, size);
    insta::assert_yaml_snapshot!("stateful-set-of-a-hubs-model", objects.workers);
    insta::assert_yaml_snapshot!("frontend-of-a-hubs-model", objects.frontends.spec.unwrap().template);
    insta::assert_yaml_snapshot!("placement-with-a-commit", objects.placement.data);
    assert_eq!(Revision::recorded(&objects.record), Some(revision));
}

#[test]
fn what_says_where_a_model_is_makes_another_revision_and_a_plain_folder_keeps_its_own() {
    let hash = |fields: &str| Revision::new(&owner(), &of_model(fields), "expertmesh:1").hash;
    assert_eq!(hash("uri: 'file:///models/tiny-r1'"), revision("").hash);
    let all = [
        "uri: 'file:///models/tiny-r1'",
        "uri: 'file:///models/tiny-r1', cache: {size: 1Gi}",
        "uri: 'hf://a/b'",
        "uri: 'hf://a/b', revision: v2",
        "uri: 'hf://a/b', endpoint: 'http://hub'",
        "uri: 'hf://a/b', tokenSecretRef: {name: hub, key: token}",
        "uri: 'pvc://a/b'",
        "uri: 'pvc://b/b'",
        "uri: 'oci://a/b:1'",
    ];
    let hashes: BTreeSet<String> = all.iter().map(|fields| hash(fields)).collect();
    assert_eq!(hashes.len(), all.len());
}

#[test]
fn a_claim_and_an_image_are_mounted_read_only_into_workers_and_frontends() {
    for fields in ["uri: 'pvc://models/v2/lite'", "uri: 'oci://registry/m:1'"] {
        let deployment = of_model(fields);
        let revision = Revision::new(&owner(), &deployment, "expertmesh:1");
        assert_eq!((revision.model(), revision.is_floating()), (Some(deployment.model.uri()), false));
        for template in [revision.workers, revision.frontend] {
            let spec = template.spec.unwrap();
            let volume = spec.volumes.unwrap().into_iter().find(|volume| volume.name == "model").unwrap();
            let claim = volume.persistent_volume_claim.map(|claim| (claim.claim_name, claim.read_only));
            let image = volume.image.and_then(|image| image.reference);
            assert!(claim == Some(("models".into(), Some(true))) || image.as_deref() == Some("registry/m:1"));
            let mounts = spec.containers[0].volume_mounts.clone().unwrap();
            let mount = mounts.iter().find(|mount| mount.name == "model").unwrap();
            assert_eq!(
                (mount.mount_path.as_str(), mount.read_only),
                ("/var/lib/expertmesh/model", Some(true))
            );
            let arguments = spec.containers[0].args.clone().unwrap().join(" ");
            assert!(arguments.contains(&format!("--model {} ", deployment.model.argument())), "{arguments}");
        }
    }
}

#[test]
fn pod_fields_reach_the_pods_and_our_labels_win() {
    let revision = revision(concat!(
        "  workers:\n",
        "    image: mine:2\n",
        "    resources: {requests: {cpu: '2', memory: 1Gi}}\n",
        "    nodeSelector: {disk: fast}\n",
        "    tolerations: [{key: spot, operator: Exists}]\n",
        "    priorityClassName: high\n",
        "    podLabels: {team: a, app.kubernetes.io/component: other}\n",
        "    podAnnotations: {note: b}\n",
        "    imagePullSecrets: [{name: registry}]\n",
        "  serving: {maxContextTokens: 512, drainTimeout: 1500ms}\n",
    ));
    insta::assert_yaml_snapshot!("worker-template-with-fields", revision.workers);
}

#[test]
fn workers_and_frontends_are_told_the_same_limits() {
    let revision = revision("  serving: {maxContextTokens: 512, drainTimeout: 1500ms}\n");
    for template in [revision.workers, revision.frontend] {
        let arguments = template.spec.unwrap().containers[0].args.clone().unwrap().join(" ");
        assert!(arguments.contains("--max-context-tokens 512 --drain-timeout 2"), "{arguments}");
    }
}

#[test]
fn workers_and_frontends_are_told_the_same_format_and_order_of_sums() {
    let mut deployment = deployment("  serving: {numerics: tile}\n");
    deployment.weights = WeightFormat::Int8;
    let revision = Revision::new(&owner(), &deployment, "expertmesh:1");
    for template in [revision.workers, revision.frontend] {
        let arguments = template.spec.unwrap().containers[0].args.clone().unwrap().join(" ");
        assert!(arguments.contains("--weights int8 --numerics tile"), "{arguments}");
        assert!(!arguments.contains("--threads"), "they follow from the quota: {arguments}");
    }
}

#[test]
fn workers_and_frontends_are_told_where_traces_go() {
    let revision = revision("  serving: {tracing: {endpoint: 'http://collector:4317', samplePercent: 5}}\n");
    for template in [revision.workers, revision.frontend] {
        let arguments = template.spec.unwrap().containers[0].args.clone().unwrap().join(" ");
        assert!(
            arguments.ends_with("--otlp-endpoint http://collector:4317 --otlp-sample 0.05"),
            "{arguments}"
        );
    }
}

#[test]
fn a_deployment_of_before_formats_could_be_chosen_keeps_its_revision() {
    for same in ["", "  serving: {numerics: pair}\n"] {
        assert_eq!(revision(same).hash, "3e3a242a", "{same}");
    }
    let mut hashes: Vec<String> = WeightFormat::ALL.map(|weights| hash_with(weights, Numerics::Pair)).into();
    assert_eq!(hashes[0], "3e3a242a", "native");
    hashes
        .extend([WeightFormat::Native, WeightFormat::Int8].map(|weights| hash_with(weights, Numerics::Tile)));
    let distinct: BTreeSet<&String> = hashes.iter().collect();
    assert_eq!(distinct.len(), hashes.len(), "{hashes:?}");
}

#[test]
fn a_slash_after_the_models_path_makes_no_revision_and_what_was_recorded_with_it_is_found() {
    let deployment = |uri: &str| {
        let object: ModelDeployment = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "tiny-r1"},
            "spec": {"model": {"uri": uri}},
        }))
        .unwrap();
        ValidatedDeployment::new(&object).unwrap()
    };
    for uri in ["file:///models/tiny-r1", "file:///models/tiny-r1/", "file:///models//./tiny-r1//"] {
        let revision = Revision::new(&owner(), &deployment(uri), "expertmesh:1");
        assert_eq!(revision.hash, "3e3a242a", "{uri}");
        assert_eq!(recorded_as(&deployment(uri)), ["3e3a242a", "c488dd9c"], "{uri}");
        let arguments = revision.workers.spec.unwrap().containers[0].args.clone().unwrap().join(" ");
        assert!(arguments.contains("--model /models/tiny-r1 "), "{arguments}");
    }
}

fn hash_with(weights: WeightFormat, numerics: Numerics) -> String {
    let mut deployment = deployment("");
    (deployment.weights, deployment.numerics) = (weights, numerics);
    Revision::new(&owner(), &deployment, "expertmesh:1").hash
}

#[test]
fn a_revision_is_what_may_not_mix_and_nothing_else() {
    let base = revision("").hash;
    for same in [
        "  workers: {replicas: 3}\n",
        "  frontend: {replicas: 2}\n",
        "  paused: true\n",
        "  serving: {drainTimeout: 5m}\n",
        "  frontend: {addressSharePercent: 100, accessLog: Text, aliases: []}\n",
    ] {
        assert_eq!(revision(same).hash, base, "{same}");
    }
    let others = [
        "  serving: {maxContextTokens: 512}\n",
        "  serving: {drainTimeout: 60s}\n",
        "  serving: {numerics: tile}\n",
        "  serving: {tracing: {endpoint: 'http://collector:4317'}}\n",
        "  workers: {image: 'other:1'}\n",
        "  workers: {resources: {requests: {cpu: '1'}}}\n",
        "  frontend: {podLabels: {a: b}}\n",
        "  frontend: {aliases: [gpt-4o]}\n",
        "  frontend: {accessLog: Json}\n",
    ];
    for other in others {
        assert_ne!(revision(other).hash, base, "{other}");
    }
}

#[test]
fn how_clients_are_treated_is_said_by_options_of_the_frontend_alone() {
    let fields = "{aliases: [gpt-4o, default], corsOrigins: ['https://a.example', 'https://b.example'], \
                  addressSharePercent: 10, accessLog: Json, specialTokensInContent: true}";
    let revision = revision(&format!("  frontend: {fields}\n"));
    let arguments =
        |template: &PodTemplateSpec| template.spec.clone().unwrap().containers.remove(0).args.unwrap();
    let frontend = arguments(&revision.frontend).join(" ");
    let expected = "--served-name gpt-4o --served-name default --cors-origins https://a.example,https://b.example \
                    --address-share 10 --access-log json --special-tokens-in-content";
    assert!(frontend.ends_with(expected), "{frontend}");
    let workers = arguments(&revision.workers).join(" ");
    assert!(!workers.contains("--served-name") && !workers.contains("--access-log"), "{workers}");
    let none = deployment("  frontend: {corsOrigins: []}\n");
    assert_eq!(none.frontend_options, ["--cors-origins", ""]);
}

#[test]
fn another_operator_image_is_no_new_revision() {
    let (owner, deployment) = (owner(), deployment(""));
    assert_eq!(
        Revision::new(&owner, &deployment, "a:1").hash,
        Revision::new(&owner, &deployment, "b:2").hash
    );
}

#[test]
fn both_kinds_of_pods_pass_pod_security_restricted() {
    let models = [
        "uri: 'file:///m'",
        "uri: 'hf://a/b', cache: {size: 1Gi}, tokenSecretRef: {name: hub, key: token}",
        "uri: 'pvc://a/b'",
        "uri: 'oci://a/b:1'",
    ];
    let revisions = models.map(|fields| Revision::new(&owner(), &of_model(fields), "expertmesh:1"));
    for template in revisions.into_iter().flat_map(|revision| [revision.workers, revision.frontend]) {
        let pod: Value = serde_json::to_value(template.spec.unwrap()).unwrap();
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for volume in pod["volumes"].as_array().unwrap() {
            let is_allowed = ["configMap", "emptyDir", "secret", "persistentVolumeClaim", "image"]
                .iter()
                .any(|kind| volume.get(kind).is_some());
            assert!(is_allowed, "{volume}");
        }
        for container in pod["containers"].as_array().unwrap() {
            let context = &container["securityContext"];
            assert_eq!(context["allowPrivilegeEscalation"], false);
            assert_eq!(context["readOnlyRootFilesystem"], true);
            assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]));
        }
    }
}

#[test]
fn names_stay_within_what_kubernetes_takes() {
    let owner = Owner { name: "a".repeat(40), ..owner() };
    // A StatefulSet puts <name>-<10 characters> into a label of its pods.
    assert!(owner.of_revision("1a2b3c4d").len() + 11 <= 63);
    assert!(owner.worker_pod("1a2b3c4d", Slot(1023)).len() <= 63);
}

#[test]
fn a_record_says_of_a_revision_that_it_was_never_ready_nor_tried_until_it_was() {
    let size = Size { workers: 1, frontends: 1, placement: None, commit: None };
    let mut revision = revision("");
    let record = |revision: &Revision| of_revision(&owner(), revision, size).record;
    let says = |record: &ControllerRevision| {
        let found = Revision::recorded(record).unwrap();
        (found.is_proven, found.is_tried)
    };
    assert_eq!(says(&record(&revision)), (false, false));
    revision.is_proven = true; // promoted at zero
    assert_eq!(says(&record(&revision)), (true, false));
    revision.is_tried = true;
    let proven = record(&revision);
    assert_eq!(says(&proven), (true, true));
    assert_eq!(proven.metadata.annotations, None, "as records of before this was noted");
}

#[test]
fn a_revision_that_was_recorded_before_there_were_identities_has_none() {
    let mut recorded = revision("");
    assert!(recorded.is_identified());
    let pod = recorded.workers.spec.as_mut().unwrap();
    pod.volumes.as_mut().unwrap().retain(|volume| volume.name != "identity");
    assert!(!recorded.is_identified(), "its pods are called in plain text until the next revision");
}

#[test]
fn frontends_mount_the_secrets_that_their_clients_need_and_the_service_has_the_port_of_https() {
    let revision =
        revision("  frontend: {apiKeysSecretRef: {name: keys}, tlsSecretRef: {name: certificate}}\n");
    insta::assert_yaml_snapshot!("frontend-template-with-secrets", revision.frontend);
    assert!(revision.is_encrypted() && !self::revision("").is_encrypted());
    let of_now = Serving::of("1a2b3c4d", &revision.frontend);
    assert!(of_now.is_dual && of_now.is_encrypted && !Serving::of("1a2b3c4d", &Default::default()).is_dual);
    let volumes = revision.workers.spec.unwrap().volumes.unwrap();
    assert!(!volumes.iter().any(|volume| volume.name == "tls"), "workers have no clients");
    let serving = Serving { revision: "1a2b3c4d", is_encrypted: true, is_dual: false };
    let surroundings = Surroundings {
        around: &Around::default(),
        operator_namespace: None,
        collector: None,
        hubs: [None, None],
    };
    insta::assert_yaml_snapshot!(
        "client-service-of-https",
        shared(&owner(), serving, surroundings).client_service.spec
    );
}
