// logits MODEL OUT TOKEN...: llama.cpp's logits after each of these tokens, (tokens, vocabulary) f32, to OUT.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "logits MODEL OUT TOKEN...\n");
        return 2;
    }
    std::vector<llama_token> tokens;
    for (int i = 3; i < argc; i++) tokens.push_back(atoi(argv[i]));

    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = tokens.size() + 64;
    params.type_k = GGML_TYPE_F32;
    params.type_v = GGML_TYPE_F32;
    llama_context * context = llama_init_from_model(model, params);
    FILE * out = fopen(argv[2], "wb");
    if (!context || !out) return 1;

    const size_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (llama_token token : tokens) {
        if (llama_decode(context, llama_batch_get_one(&token, 1)) != 0) return 1;
        if (fwrite(llama_get_logits_ith(context, -1), sizeof(float), vocabulary, out) != vocabulary) return 1;
    }
    const bool written = fclose(out) == 0;
    llama_free(context);
    llama_model_free(model);
    llama_backend_free();
    return written ? 0 : 1;
}
