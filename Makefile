# Everything is built with the release profile, so that nothing is compiled twice.
CARGO = cargo
CRD = deploy/crds/modeldeployments.yaml
CHART_FILES = charts/expertmesh/files
METRICS = docs/metrics.md
SOAK_SECONDS = 600
FUZZ_SECONDS = 60

export PATH := $(CURDIR)/target/cluster/bin:$(CURDIR)/target/tools/bin:$(CURDIR)/target/release:$(PATH)

.PHONY: help up test build soak skew fuzz bench setup fmt lint generated check-generated cluster cluster-load monitoring cluster-down image sbom audit

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

up: build ## build, and serve deploy/samples/tiny-r1.yaml by processes of this machine; Ctrl-C ends it
	target/release/expertmesh up deploy/samples/tiny-r1.yaml --root tests

test: setup lint check-generated ## every check and every test; names at its end what it had to skip
	tests/orphans.sh
	@grep -q '^cargo-deny:' target/skip || $(MAKE) --no-print-directory audit
	$(CARGO) test --release --workspace --no-run
	@if grep -q '^kubernetes:' target/skip; then with=; else with=tests/cluster/with.sh; helm lint --strict --quiet charts/expertmesh; fi && \
	 EXPERTMESH_SKIP=$$(cut -d: -f1 target/skip | paste -sd,) $$with $(CARGO) test --release --workspace
	@sed 's/^\([a-z]*\): /SKIPPED: the tests with \1, since /' target/skip

build: ## all binaries, in target/release
	@[ -x target/release/expertmesh ] || echo 'building all binaries: minutes, the first time' >&2
	$(CARGO) build --release --workspace
	@ln -sf expertmesh target/release/kubectl-expertmesh # which makes it `kubectl expertmesh`, where this folder is in PATH

setup: ## fetch what the tests need beside Rust, and say what cannot be had
	@tests/setup.sh

soak: build ## what takes long: a client without manners for SOAK_SECONDS (600), an honest one beside it
	EXPERTMESH_SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --release --workspace --test all -- abuse --nocapture

skew: build ## the programs of the last release beside those of now, on every wire; builds the last release, once
	tests/skew.sh

fuzz: ## what strangers' bytes may do: each target of fuzz/ for FUZZ_SECONDS (60); needs a nightly compiler
	tests/fuzz.sh $(FUZZ_SECONDS)

bench: ## our numbers beside llama.cpp's on this machine: a table, and target/bench/summary.json (see benches/README.md)
	$(CARGO) build --release -p expertmesh-bench -p expertmesh-worker
	benches/llama.sh
	target/release/expertmesh-bench same
	target/release/expertmesh-bench compare
	target/release/expertmesh-bench mesh
	target/release/expertmesh-bench mesh --model target/bench/model --samples 3

fmt: ## format all Rust
	$(CARGO) fmt --all

lint: ## formatting, clippy, rustdoc and what doc comments say; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --release --workspace --no-deps --document-private-items --quiet
	tests/words.sh

generated: build ## write the generated files anew: the CRD, the page of metrics, the chart's copies of files of deploy/
	target/release/expertmesh crd >$(CRD)
	{ target/release/expertmesh metrics && target/release/expertmesh-worker metrics; } >$(METRICS)
	cp $(CRD) $(CHART_FILES)/modeldeployments.yaml
	cp deploy/alerts/expertmesh.yaml $(CHART_FILES)/alerts.yaml
	rm -rf $(CHART_FILES)/dashboards && cp -r deploy/dashboards $(CHART_FILES)/dashboards

check-generated: build
	@target/release/expertmesh crd | cmp - $(CRD) && \
	 { target/release/expertmesh metrics && target/release/expertmesh-worker metrics; } | cmp - $(METRICS) && \
	 cmp $(CRD) $(CHART_FILES)/modeldeployments.yaml && cmp deploy/alerts/expertmesh.yaml $(CHART_FILES)/alerts.yaml && \
	 diff -rq deploy/dashboards $(CHART_FILES)/dashboards || { echo 'not what the code says; run `make generated`' >&2; exit 1; }

cluster: ## a three-node Kubernetes on this machine, and what it lacks first; prints the line that makes it this shell's
	@env -u KUBECONFIG tests/setup.sh kubernetes
	@tests/cluster/up.sh

cluster-load: image ## the project's image into the cluster's nodes
	@tests/cluster/load.sh target/image/expertmesh.tar

monitoring: ## Prometheus beside the cluster, which must run, with our rules; prints its URL
	@env -u KUBECONFIG tests/setup.sh kubernetes prometheus
	@tests/cluster/prometheus.sh

cluster-down: ## take the cluster away; its binaries stay
	@tests/cluster/down.sh

image: build ## the image expertmesh.dev/expertmesh:dev, as target/image/expertmesh.tar
	@deploy/image.sh

sbom: ## what the image's programs are made of, as CycloneDX: target/sbom
	@command -v cargo-cyclonedx >/dev/null || $(CARGO) install --locked --root target/tools cargo-cyclonedx
	@mkdir -p target/sbom
	$(CARGO) cyclonedx --format json --spec-version 1.5 --describe binaries --no-build-deps --quiet
	@for folder in operator operator/traffic worker; do mv $$folder/*_bin.cdx.json target/sbom; done && rm -f */*_bin.cdx.json
	@ls target/sbom

audit: ## dependencies: bans, licences, sources
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked --root target/tools cargo-deny
	$(CARGO) deny check bans licenses sources
