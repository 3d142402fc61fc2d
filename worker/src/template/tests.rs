use super::message::Role;
use super::*;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::tests::tiny_r1;

fn user(content: &str) -> Message {
    Message { role: Role::User, content: content.into() }
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::of(source)
}

#[derive(Deserialize)]
struct Heldout {
    prompt: String,
    ids: Vec<u32>,
    prompt_len: usize,
}

#[test]
fn tiny_r1s_prompts_are_tokenized_as_transformers_did() {
    let (chat, tokenizer) = (ChatTemplate::load(&tiny_r1()).unwrap(), Tokenizer::load(&tiny_r1()).unwrap());
    let text = std::fs::read_to_string(tiny_r1().join("heldout.json")).unwrap();
    let heldout: Vec<Heldout> = serde_json::from_str(&text).unwrap();
    assert_eq!(heldout.len(), 40);
    for Heldout { prompt, ids, prompt_len } in heldout {
        let text = chat.render(&[user(&prompt)], true, &Map::new(), 0).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap(), ids[..prompt_len], "{prompt}");
    }
}

#[test]
fn an_assistants_thoughts_are_left_out_of_the_next_prompt() {
    let chat = ChatTemplate::load(&tiny_r1()).unwrap();
    let answer = Message { role: Role::Assistant, content: "<think>\nhm\n</think>\n\n8".into() };
    let text = chat.render(&[user("6 + 2?"), answer, user("And 1 more?")], true, &Map::new(), 0).unwrap();
    let expected = "<｜begin▁of▁sentence｜><｜User｜>6 + 2?<｜Assistant｜>8<｜end▁of▁sentence｜><｜User｜>And 1 more?<｜Assistant｜><think>\n";
    assert_eq!(text, expected);
}

#[test]
fn what_a_template_raises_is_told_apart_from_what_it_does_wrong() {
    let refusing =
        template("{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}");
    let system = Message { role: Role::System, content: String::new() };
    let error = refusing.render(&[system], false, &Map::new(), 0).unwrap_err();
    assert!(matches!(&error, TemplateError::Raised(message) if message == "users first"), "{error}");
    let failing =
        template("{{ messages.nothing() }}").render(&[user("x")], false, &Map::new(), 0).unwrap_err();
    assert_eq!(failing.reason(), "ChatTemplateFailed");
}

#[test]
fn blocks_are_trimmed_and_json_is_pythons() {
    let source = "{{ bos_token }}{% for m in messages %}\n    {% if true %}\n{{ m | tojson }}\n    {% endif %}\n{% endfor %}";
    let text = template(source).render(&[user("<b> & 'é'")], false, &Map::new(), 0).unwrap();
    assert_eq!(text, "<s>{\"role\": \"user\", \"content\": \"<b> & 'é'\"}\n");
}

#[test]
fn a_template_knows_the_date() {
    let text = template("{{ strftime_now('%Y') }}").render(&[], false, &Map::new(), 1_800_000_000).unwrap();
    assert_eq!(text, "2027");
}

#[test]
fn a_model_without_a_template_loads_and_says_so_when_asked() {
    let chat = ChatTemplate::load(Path::new("/nowhere")).unwrap();
    assert_eq!(
        chat.render(&[], true, &Map::new(), 0).unwrap_err().to_string(),
        "the model has no chat template"
    );
}

#[test]
fn tokens_and_templates_come_in_both_of_their_forms() {
    let json = r#"{"bos_token": {"content": "<s>", "special": true}, "eos_token": null,
                   "add_bos_token": null, "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
    let config: TokenizerConfig = serde_json::from_str(json).unwrap();
    assert_eq!(config.tokens(), BTreeMap::from([("bos_token", "<s>".to_string())]));
    assert_eq!(config.chat_template.and_then(Source::chat).as_deref(), Some("yes"));
}

#[test]
fn a_template_looks_at_options_and_not_at_others_names_for_what_is_given() {
    let source = "{{ 'thinks' if enable_thinking else 'answers' }}{{ ' without tools' if tools is none }}";
    let options = |json: &str| serde_json::from_str::<Map<String, serde_json::Value>>(json).unwrap();
    let render =
        |json| template(source).render(&[user("x")], true, &options(json), 0).map_err(|e| e.to_string());
    assert_eq!(render(r#"{"enable_thinking": true}"#).as_deref(), Ok("thinks without tools"));
    assert_eq!(render("{}").as_deref(), Ok("answers without tools"));
    let refused = "messages is not for a client to set";
    assert_eq!(render(r#"{"messages": []}"#), Err(refused.to_string()));
}

/// What `tests/golden/templates/make.py` recorded.
#[derive(Deserialize)]
struct Recorded {
    template: String,
    context: Value,
    rendered: Option<String>,
    raised: Option<String>,
}

#[test]
fn templates_render_as_jinja_renders_them_for_transformers() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/templates");
    let cases: Vec<Recorded> =
        serde_json::from_slice(&std::fs::read(golden.join("golden.json")).unwrap()).unwrap();
    assert!(cases.len() > 90, "{}", cases.len());
    let at = jiff::civil::date(2026, 1, 2).at(3, 4, 5, 0);
    for Recorded { template, context, rendered, raised } in cases {
        let source = std::fs::read_to_string(golden.join(format!("{template}.jinja"))).unwrap();
        let environment = compile(Some(source)).unwrap();
        let chat = ChatTemplate { environment, tokens: BTreeMap::new(), add_bos: false, apart: None };
        match (chat.fill(context.clone(), Bounds::of(100, 10_000), at), rendered, raised) {
            (Ok(text), Some(rendered), _) => assert_eq!(text, rendered, "{template} of {context}"),
            (Err(TemplateError::Raised(message)), _, Some(raised)) => assert_eq!(message, raised),
            (found, rendered, raised) => panic!("{template}: {found:?}, not {rendered:?} or {raised:?}"),
        }
    }
}

#[test]
fn a_template_that_never_ends_or_writes_too_much_is_stopped_and_says_so() {
    let deep = "{% for i in range(9999) %}".repeat(3) + &"{% endfor %}".repeat(3);
    let doubled = "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}";
    let listed = |shown: &str| {
        "{% set ns = namespace(x=['a']) %}{% for i in range(22) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ SHOWN }}".replace("SHOWN", shown)
    };
    let lists =
        ["ns.x | tojson | length", "ns.x", "ns.x | string", "','.join(ns.x)", "ns.x | join('')"].map(listed);
    let reason = |source: &str| match template(source).render(&[user("x")], false, &Map::new(), 0) {
        Ok(text) => panic!("{} bytes of {source}", text.len()),
        Err(error) => error.reason(),
    };
    let replaced = "{{ ('x' * 99999).replace('', 'y' * 99999) }}";
    for source in
        lists.iter().map(String::as_str).chain([&deep[..], doubled, replaced, "{{ 'x' * 2000000000 }}"])
    {
        assert_eq!(reason(source), "ChatTemplateEndless", "{source}");
    }
    assert_eq!(reason("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"), "ChatTemplateFailed");
    assert_eq!(reason("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}"), "ChatTemplateTooLong");
    assert_ne!(reason("{% for i in range(10**9) %}x{% endfor %}"), "ChatTemplateRefused");
    assert!(compile(Some(format!("{{{{ {}1{} }}}}", "(".repeat(20000), ")".repeat(20000)))).is_err());
}

#[test]
fn the_longest_conversations_are_rendered() {
    let chat = ChatTemplate::load(&tiny_r1()).unwrap();
    let many: Vec<Message> = (0..16384).map(|_| user("x")).collect();
    assert!(chat.render(&many, true, &Map::new(), 0).unwrap().len() > 16384);
    let long = "word ".repeat(2 << 20);
    assert!(chat.render(&[user(&long)], true, &Map::new(), 0).unwrap().len() > long.len());
}
