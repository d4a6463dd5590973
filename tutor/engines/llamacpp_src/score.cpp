// Teacher-forced log-probabilities of given token ids under a GGUF model: llama-server scores only what it
// generates, and llama-perplexity scores whole texts, so neither can say what a held-out answer costs.
//
//   tutor-score MODEL THREADS TOP [LORA] < rows > scores
//
// A row is one line of integers: the number of prompt ids, then all ids (prompt and answer).
// A score is one JSON line: natural-log probabilities of the answer's ids, and for every one of them the
// TOP most probable ids at that place as [id, logprob] pairs, best first (ties: the lower id).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::fputs(text, stderr);
    }
}

static int fail(const std::string & message) {
    std::fprintf(stderr, "tutor-score: %s\n", message.c_str());
    return 1;
}

struct Row {
    size_t                   n_prompt;
    std::vector<llama_token> ids;
};

static bool read_rows(std::vector<Row> & rows, int n_vocab, std::string & problem) {
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream in(line);
        long               n_prompt = 0;
        in >> n_prompt;
        Row  row{};
        long id = 0;
        while (in >> id) {
            if (id < 0 || id >= n_vocab) {
                problem = "token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(n_vocab);
                return false;
            }
            row.ids.push_back(static_cast<llama_token>(id));
        }
        if (!in.eof() || n_prompt < 1 || static_cast<size_t>(n_prompt) >= row.ids.size()) {
            problem = "row " + std::to_string(rows.size() + 1) + " is not: prompt length, prompt ids, answer ids";
            return false;
        }
        row.n_prompt = static_cast<size_t>(n_prompt);
        rows.push_back(row);
    }
    return true;
}

// log(sum(exp(logits))), in double and against the maximum, so that it neither overflows nor drifts.
static double log_sum_exp(const float * logits, int n_vocab) {
    const float highest = *std::max_element(logits, logits + n_vocab);
    double      sum     = 0.0;
    for (int i = 0; i < n_vocab; i++) {
        sum += std::exp(static_cast<double>(logits[i]) - highest);
    }
    return highest + std::log(sum);
}

static std::string score_row(llama_context * ctx, const Row & row, int n_vocab, int top) {
    std::ostringstream logprobs, tops;
    std::vector<int>   order(n_vocab);
    logprobs.precision(9);
    tops.precision(9);
    for (size_t i = row.n_prompt; i < row.ids.size(); i++) {
        const float * logits = llama_get_logits_ith(ctx, static_cast<int32_t>(i - 1));
        const double  norm   = log_sum_exp(logits, n_vocab);
        const char *  comma  = i == row.n_prompt ? "" : ",";
        logprobs << comma << logits[row.ids[i]] - norm;
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + top, order.end(), [logits](int a, int b) {
            return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
        });
        tops << comma << '[';
        for (int k = 0; k < top; k++) {
            tops << (k ? "," : "") << '[' << order[k] << ',' << logits[order[k]] - norm << ']';
        }
        tops << ']';
    }
    return "{\"logprobs\":[" + logprobs.str() + "],\"top\":[" + tops.str() + "]}";
}

int main(int argc, char ** argv) {
    if (argc != 4 && argc != 5) {
        return fail("usage: tutor-score MODEL THREADS TOP [LORA] < rows");
    }
    const int threads = std::atoi(argv[2]);
    const int top     = std::atoi(argv[3]);
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) {
        return fail(std::string("cannot load ") + argv[1]);
    }
    const int        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<Row> rows;
    std::string      problem;
    if (threads < 1 || top < 1 || top > n_vocab) {
        return fail("THREADS and TOP are positive numbers, TOP at most the vocabulary");
    }
    if (!read_rows(rows, n_vocab, problem)) {
        return fail(problem);
    }
    size_t longest = 1;
    for (const Row & row : rows) {
        longest = std::max(longest, row.ids.size());
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = static_cast<uint32_t>(longest);
    params.n_batch              = static_cast<uint32_t>(longest);
    params.n_threads            = threads;
    params.n_threads_batch      = threads;
    llama_context * ctx         = llama_init_from_model(model, params);
    if (ctx == nullptr) {
        return fail("no context for " + std::to_string(longest) + " tokens");
    }
    if (argc == 5) {
        llama_adapter_lora * lora  = llama_adapter_lora_init(model, argv[4]);
        float                scale = 1.0f;
        if (lora == nullptr || llama_set_adapters_lora(ctx, &lora, 1, &scale) != 0) {
            return fail(std::string("cannot apply ") + argv[4]);
        }
    }
    llama_batch batch = llama_batch_init(static_cast<int32_t>(longest), 0, 1);
    for (const Row & row : rows) {
        llama_memory_clear(llama_get_memory(ctx), true);
        batch.n_tokens = static_cast<int32_t>(row.ids.size());
        for (size_t i = 0; i < row.ids.size(); i++) {
            batch.token[i]     = row.ids[i];
            batch.pos[i]       = static_cast<llama_pos>(i);
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = i + 1 >= row.n_prompt && i + 1 < row.ids.size();
        }
        if (llama_decode(ctx, batch) != 0) {
            return fail("llama_decode failed");
        }
        std::cout << score_row(ctx, row, n_vocab, top) << std::endl;
    }
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
